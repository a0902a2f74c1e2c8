"""Four ways of opening a model, each a few lines with `capture` and `edit`, and what they find in
`tiny`: the logit lens, activation patching, steering and ablation."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

import llama32
from llama32 import capture, edit
from llama32.model import Llama

TEXT = "Once upon a time, there was a little {} named Spot. Spot was a very happy"
Encode = Callable[[str], torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> llama32.LLM:
    return llama32.load("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tiny) -> Llama:
    return tiny.model.requires_grad_(False)


@pytest.fixture(scope="module")
def encode(tiny) -> Encode:
    return lambda text: torch.tensor([tiny.tokenizer.encode(text, bos=True)])


@pytest.fixture(scope="module")
def chances(tiny) -> Callable[..., list[float]]:
    """Of these words to be next."""

    def of(logits: torch.Tensor, *words: str) -> list[float]:
        ids = [tiny.tokenizer.encode(word)[0] for word in words]
        return logits[0, -1].softmax(-1)[ids].tolist()

    return of


def stream(model: Llama) -> list[str]:
    """The names of the residual stream, from bottom to top."""
    return ["embed", *(f"layers.{i}" for i in range(len(model.layers)))]


def without(model: Llama, name: str, *heads: int) -> AbstractContextManager[None]:
    """These heads give nothing."""
    kept = torch.ones(model.config.num_attention_heads, 1)
    kept[list(heads)] = 0
    return edit(model, name, lambda x: x * kept)


def test_the_lens_comes_nearer_to_the_output_with_every_layer_and_ends_there(tiny, model, encode):
    story = tiny.generate("Once upon a time", temperature=0, max_new_tokens=120)
    tokens = encode(f"Once upon a time{story.text}")
    with capture(model, *stream(model)) as seen:
        logits = model(tokens)
    says = [model.lm_head(model.norm(seen[name])) for name in stream(model)]
    assert torch.equal(says[0].argmax(-1), tokens)  # tied: an embedding is nearest to itself
    assert torch.equal(says[-1], logits)
    agrees = [(one.argmax(-1) == logits.argmax(-1)).float().mean().item() for one in says]
    assert agrees == sorted(agrees)
    assert agrees[1] < 0.25
    assert agrees[-2] > 2 * agrees[1]


def test_patching_the_whole_stream_anywhere_gives_the_other_run(model, encode):
    dog, cat = encode(TEXT.format("dog")), encode(TEXT.format("cat"))
    with capture(model, *stream(model)) as seen:
        expected = model(cat)
    assert not torch.allclose(model(dog), expected)
    for name in stream(model):
        with edit(model, name, lambda _, x=seen[name]: x):
            assert torch.equal(model(dog), expected), name


@pytest.mark.parametrize(
    ("layer", "at", "share"), [(4, "word", 1), (4, "end", 0), (5, "word", 0), (5, "end", 1)]
)
def test_the_animal_waits_where_it_was_said_until_the_last_layer_fetches_it(
    model, encode, chances, layer, at, share
):
    def gap(logits):
        cat, dog = torch.tensor(chances(logits, " cat", " dog")).log()
        return cat - dog

    texts = dog, cat = encode(TEXT.format("dog")), encode(TEXT.format("cat"))
    with capture(model, f"layers.{layer}") as seen:
        start, end = (gap(model(text)) for text in texts)
    x, other = (x.clone() for x in seen.passes[f"layers.{layer}"])
    t = -1 if at == "end" else int((dog != cat).nonzero()[0, 1])
    x[:, t] = other[:, t]
    with edit(model, f"layers.{layer}", lambda _: x):
        moved = (gap(model(dog)) - start) / (end - start)
    assert moved.item() == pytest.approx(float(share), abs=0.05)


def test_steering_makes_sad_words_likelier_and_glad_ones_less_likely(model, encode, chances):
    def mean(text):
        with capture(model, "layers.2") as seen:
            model(encode(text))
        return seen["layers.2"][0, 1:].mean(0)

    sad = mean("Lily was very sad. She cried. Tim lost his toy. He was so sad that he cried.")
    glad = mean("Lily was very happy. She smiled. Tim got a toy. He was so happy that he laughed.")
    tokens, found = encode("One day, Lily went to the park. She was very"), []
    for strength in (-1.0, 0.0, 1.0, 2.0):
        with edit(model, "layers.2", lambda x, by=strength * (sad - glad): x + by):
            found.append(chances(model(tokens), " sad", " happy", " excited"))
    of_sad = [sad for sad, *_ in found]
    of_glad = [happy + excited for _, happy, excited in found]
    assert of_sad == sorted(of_sad)
    assert of_glad == sorted(of_glad, reverse=True)
    assert of_sad[1] < 0.01 < 0.1 < of_sad[2]
    assert of_glad[3] < 0.1 < 0.7 < of_glad[1]


def test_without_any_head_attention_adds_nothing(model, encode):
    tokens, H = encode(TEXT.format("dog")), model.config.num_attention_heads
    nothing = model(tokens, attend=lambda q, k, v: torch.zeros_like(q))
    with without(model, "layers.*.attn.heads", *range(H)):
        assert torch.equal(model(tokens), nothing)
    with without(model, "layers.*.attn.heads", *range(1, H)):
        assert not torch.allclose(model(tokens), nothing)


def test_two_heads_of_the_last_layer_carry_the_animal(model, encode, chances):
    tokens, name = encode(TEXT.format("dog")), "layers.5.attn.heads"
    for heads, low, high in [((), 0.9, 1), ((0, 2, 4, 5, 6, 7), 0.5, 1), ((1, 3), 0, 0.05)]:
        with without(model, name, *heads):
            (dog,) = chances(model(tokens), " dog")
        assert low < dog < high, heads
