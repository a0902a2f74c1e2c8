"""Accuracy of quantized weights and caches, against the fp32 model, on held-out texts.

python benchmarks/quantization.py TEXTS [--peer stories260K] [--save]

Measured for tiny, and for stories260K (the folder described in weights/measure_tiny.py): mean KL
divergence of the next-token distribution from fp32, how often the most likely token is the same,
and perplexity. The weight error is relative, over all linear layers of the transformer blocks.
Every kernel that the machine supports is measured.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import RESULTS, provenance, save_result, table
from torch import nn
from torch.nn.functional import kl_div, nll_loss

import llama32
from llama32.cache.batch import Batch, Span
from llama32.cache.int8_kv_cache import Int8Cache
from llama32.kernels.autotune import KERNELS, ROWS, Autotuner, KernelChoice, Timing, layer_kind
from llama32.kernels.fused_projections import ProjectionSlice
from llama32.kernels.packed_linear import PackedLinear
from llama32.model import Llama
from llama32.quantization.quantize import SCHEMES
from llama32.quantization.quantized_linear import QuantizedLinear
from llama32.quantization.tied_embedding import linear_layer_names

sys.path.insert(0, str(Path(__file__).parent.parent / "weights"))
from make_tiny import read_stories
from measure_tiny import encode_by_scores

STORIES = 100


class Score(NamedTuple):
    """Accuracy of a variant of a model."""

    weight_error: float
    divergence: float
    agreement: float
    perplexity: float


Forward = Callable[[torch.Tensor], torch.Tensor]  # (1, T) -> (1, T, V)


def variants(folder: Path | str) -> Iterator[tuple[str, Llama, Forward]]:
    """Yield title, model and forward function of every variant; the fp32 reference is first.

    All other variants compute in the stored dtype.
    """
    reference = llama32.load_model(folder, dtype=torch.float32)
    yield "fp32", reference, reference
    for scheme in (None, *SCHEMES):
        plain = llama32.load_model(folder, quantize=scheme)
        kind = scheme or str(plain.norm.weight.dtype).removeprefix("torch.")
        yield f"{kind}, plain", plain, plain
        if scheme is None:
            yield f"{kind}, keys and values in int8", plain, partial(with_int8_cache, plain)
        for kernel in KERNELS:
            model = packed_model(folder, scheme, kernel)
            if model is not None:
                yield f"{kind}, {kernel.title}", model, model


def with_int8_cache(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits computed with keys and values rounded by the int8 cache."""
    ids = tokens[0].tolist()
    cache = Int8Cache(model.config, -(-len(ids) // 64), 64, dtype=model.norm.weight.dtype)
    batch = Batch.pack([Span(ids, 0, [*range(len(cache.free_pages))])], 64)
    return model(batch.tokens, batch.positions, cache.attention_fns(batch)).unsqueeze(0)


def packed_model(
    folder: Path | str, scheme: str | None, kernel: type[PackedLinear]
) -> Llama | None:
    """Return the model with a kernel in all layers that the kernel supports, otherwise None.

    The int8 head of an int4 model gets the default kernel.
    """
    model = llama32.load_model(folder, quantize=scheme)
    layer: Any = model.get_submodule("layers.0.mlp.up_proj")
    if not kernel.supports(layer):
        return None
    kind = layer_kind(layer)
    tuner = Autotuner({kind: KernelChoice(kind, [Timing(kernel, (0.0,) * len(ROWS))])})
    for name in linear_layer_names(model):
        tuner.replace(model, name)
    return model.requires_grad_(False)


def linear_weights(model: Llama) -> dict[str, torch.Tensor]:
    """Return the fp32 weights of all linear layers in the transformer blocks."""
    weights = {}
    for name, part in model.layers.named_modules():
        if isinstance(part, nn.Linear):
            weights[name] = part.weight.detach().float()
        elif isinstance(part, QuantizedLinear):
            weights[name] = part.dequantized()
        elif isinstance(part, PackedLinear | ProjectionSlice):
            weights[name] = part.unpacked().float()
    return weights


@torch.inference_mode()
def score(
    model: Llama, forward: Forward, reference: Llama, texts: Sequence[Sequence[int]]
) -> Score:
    """Score a variant on every token after the first of each text."""
    divergence = agreement = loss = 0.0
    for ids in texts:
        tokens = torch.tensor([ids])
        log_probs = forward(tokens)[0, :-1].float().log_softmax(-1)
        expected = reference(tokens)[0, :-1].log_softmax(-1)
        divergence += kl_div(log_probs, expected, log_target=True, reduction="sum").item()
        agreement += (log_probs.argmax(-1) == expected.argmax(-1)).sum().item()
        loss += nll_loss(log_probs, tokens[0, 1:], reduction="sum").item()
    steps = sum(len(ids) - 1 for ids in texts)
    return Score(
        weight_error(model, reference),
        divergence / steps,
        agreement / steps,
        math.exp(loss / steps),
    )


def weight_error(model: Llama, reference: Llama) -> float:
    """Return the norm of the weight error relative to the norm of all weights; nan if unchanged."""
    try:
        weights = linear_weights(model)
    except NotImplementedError:  # a kernel that cannot unpack holds the weights of the plain layer
        return math.nan
    expected = linear_weights(reference)
    error = sum((weights[name] - expected[name]).square().sum() for name in expected)
    return float((error / sum(weight.square().sum() for weight in expected.values())) ** 0.5)


def score_rows(scores: Mapping[str, Score]) -> list[list[str]]:
    return [
        [
            name,
            "as plain" if math.isnan(result.weight_error) else f"{result.weight_error:.4f}",
            f"{result.divergence:.1e}",
            f"{result.agreement:.2%}",
            f"{result.perplexity:.3f}",
        ]
        for name, result in scores.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the accuracy of quantization.")
    parser.add_argument("texts", type=Path, help="folder with *_heldout.txt")
    parser.add_argument("--peer", type=Path, help="folder of stories260K")
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    stories = read_stories(options.texts, "*_heldout.txt")
    llm = llama32.load("tiny")
    assert llm.tokenizer is not None
    encoded = {"tiny": [llm.tokenizer.encode(story, bos=True) for story in stories]}
    folders: dict[str, Path | str] = {"tiny": "tiny"}
    if options.peer:
        encoded["stories260K"] = [encode_by_scores(story, options.peer) for story in stories]
        folders["stories260K"] = options.peer / "hf"
    reports, results = [], {}
    head = ["", "weight error", "mean KL from fp32", "same choice", "perplexity"]
    for name, folder in folders.items():
        models = variants(folder)
        _, reference, _ = next(models)
        limit = reference.config.max_position_embeddings
        texts = [ids for ids in encoded[name] if len(ids) <= limit][:STORIES]
        scores = {"fp32": score(reference, reference, reference, texts)}
        scores |= {
            title: score(model, forward, reference, texts) for title, model, forward in models
        }
        tokens = sum(len(ids) - 1 for ids in texts)
        title = f"{name}, {len(texts)} stories, {tokens:,} tokens:"
        reports.append(f"{title}\n\n{table(head, score_rows(scores))}")
        results[name] = {title: result._asdict() for title, result in scores.items()}
    report = "\n\n".join(reports)
    print(report)
    if options.save:
        peer = " --peer stories260K" if options.peer else ""
        command = f"benchmarks/quantization.py TEXTS{peer} --save"
        save_result("quantization", report, provenance(command), results)


if __name__ == "__main__":
    main()
