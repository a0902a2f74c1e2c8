"""What fewer bits cost in accuracy, against the same model in fp32, on texts it has not seen.

python benchmarks/quantization.py TEXTS [--peer stories260K] [--save]

For tiny (and for stories260K, of the folder that weights/measure_tiny.py describes): the mean
divergence of the next token's distribution from fp32's, how often the likeliest token is the same,
and perplexity. The error of weights is relative, over all linear layers of the blocks. Every form
is taken that this machine can do.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import RESULTS, circumstances, keep, table
from torch import nn
from torch.nn.functional import kl_div, nll_loss

import llama32
from llama32.adapt.fused import Part
from llama32.adapt.optimize import FORMS, ROWS, Choice, Optimizer, Trial, kind_of
from llama32.adapt.packed import PackedLinear
from llama32.adapt.quantize import SCHEMES
from llama32.adapt.quantized import QuantizedLinear
from llama32.adapt.tied import linear_layers
from llama32.batch import Batch, Span
from llama32.int8_cache import Int8Cache
from llama32.model import Llama

sys.path.insert(0, str(Path(__file__).parent.parent / "weights"))
from make_tiny import read
from measure_tiny import encode_by_scores

STORIES = 100


class Score(NamedTuple):
    """Of one form of a model."""

    weight_error: float
    divergence: float
    agreement: float
    perplexity: float


Run = Callable[[torch.Tensor], torch.Tensor]  # (1, T) -> (1, T, V)


def forms(folder: Path | str) -> Iterator[tuple[str, Llama, Run]]:
    """The model in every form and how it is run, the fp32 one first; others compute in what it is
    stored in."""
    wide = llama32.load_model(folder, dtype=torch.float32)
    yield "fp32", wide, wide
    for scheme in (None, *SCHEMES):
        plain = llama32.load_model(folder, quantize=scheme)
        kind = scheme or str(plain.norm.weight.dtype).removeprefix("torch.")
        yield f"{kind}, plain", plain, plain
        if scheme is None:
            yield f"{kind}, keys and values in int8", plain, partial(with_int8_cache, plain)
        for form in FORMS:
            model = in_form(folder, scheme, form)
            if model is not None:
                yield f"{kind}, {form.title}", model, model


def with_int8_cache(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Every token sees the others, and itself, as the cache has rounded them."""
    ids = tokens[0].tolist()
    cache = Int8Cache(model.config, -(-len(ids) // 64), 64, dtype=model.norm.weight.dtype)
    batch = Batch.pack([Span(ids, 0, [*range(len(cache.free))])], 64)
    return model(batch.tokens, batch.positions, cache.attends(batch)).unsqueeze(0)


def in_form(folder: Path | str, scheme: str | None, form: type[PackedLinear]) -> Llama | None:
    """With all layers that it fits in one form, the head of int4 in the usual one of int8; None
    where it fits none of its blocks."""
    model = llama32.load_model(folder, quantize=scheme)
    layer: Any = model.get_submodule("layers.0.mlp.up_proj")
    if not form.fits(layer):
        return None
    kind = kind_of(layer)
    optimizer = Optimizer({kind: Choice(kind, [Trial(form, (0.0,) * len(ROWS))])})
    for name in linear_layers(model):
        optimizer.replace(model, name)
    return model.requires_grad_(False)


def weights(model: Llama) -> dict[str, torch.Tensor]:
    """Of the blocks' linear layers, in fp32."""
    found = {}
    for name, part in model.layers.named_modules():
        if isinstance(part, nn.Linear):
            found[name] = part.weight.detach().float()
        elif isinstance(part, QuantizedLinear):
            found[name] = part.dequantized()
        elif isinstance(part, PackedLinear | Part):
            found[name] = part.unpacked().float()
    return found


@torch.inference_mode()
def score(model: Llama, run: Run, wide: Llama, texts: Sequence[Sequence[int]]) -> Score:
    """Text by text, every token after the first."""
    divergence = agreement = loss = 0.0
    for ids in texts:
        tokens = torch.tensor([ids])
        found = run(tokens)[0, :-1].float().log_softmax(-1)
        wanted = wide(tokens)[0, :-1].log_softmax(-1)
        divergence += kl_div(found, wanted, log_target=True, reduction="sum").item()
        agreement += (found.argmax(-1) == wanted.argmax(-1)).sum().item()
        loss += nll_loss(found, tokens[0, 1:], reduction="sum").item()
    steps = sum(len(ids) - 1 for ids in texts)
    return Score(
        weight_error(model, wide), divergence / steps, agreement / steps, math.exp(loss / steps)
    )


def weight_error(model: Llama, wide: Llama) -> float:
    """Over all: the size of what is missing as a part of the whole."""
    try:
        found = weights(model)
    except NotImplementedError:  # it holds what the plain one does
        return math.nan
    wanted = weights(wide)
    missing = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((missing / sum(weight.square().sum() for weight in wanted.values())) ** 0.5)


def rows(found: Mapping[str, Score]) -> list[list[str]]:
    return [
        [
            name,
            "as plain" if math.isnan(one.weight_error) else f"{one.weight_error:.4f}",
            f"{one.divergence:.1e}",
            f"{one.agreement:.2%}",
            f"{one.perplexity:.3f}",
        ]
        for name, one in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what quantization costs in accuracy.")
    parser.add_argument("texts", type=Path, help="folder with *_heldout.txt")
    parser.add_argument("--peer", type=Path, help="folder of stories260K")
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    stories = read(options.texts, "*_heldout.txt")
    llm = llama32.load("tiny")
    assert llm.tokenizer is not None
    encoded = {"tiny": [llm.tokenizer.encode(story, bos=True) for story in stories]}
    folders: dict[str, Path | str] = {"tiny": "tiny"}
    if options.peer:
        encoded["stories260K"] = [encode_by_scores(story, options.peer) for story in stories]
        folders["stories260K"] = options.peer / "hf"
    reports, kept = [], {}
    head = ["", "weight error", "mean KL from fp32", "same choice", "perplexity"]
    for name, folder in folders.items():
        each = forms(folder)
        _, wide, _ = next(each)
        limit = wide.config.max_position_embeddings
        texts = [ids for ids in encoded[name] if len(ids) <= limit][:STORIES]
        found = {"fp32": score(wide, wide, wide, texts)}
        found |= {title: score(model, run, wide, texts) for title, model, run in each}
        tokens = sum(len(ids) - 1 for ids in texts)
        title = f"{name}, {len(texts)} stories, {tokens:,} tokens:"
        reports.append(f"{title}\n\n{table(head, rows(found))}")
        kept[name] = {title: one._asdict() for title, one in found.items()}
    report = "\n\n".join(reports)
    print(report)
    if options.save:
        peer = " --peer stories260K" if options.peer else ""
        command = f"benchmarks/quantization.py TEXTS{peer} --save"
        keep("quantization", report, circumstances(command), kept)


if __name__ == "__main__":
    main()
