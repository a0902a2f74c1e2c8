"""Four methods of interpretability in a few lines of `capture` and `edit`, with findings in `tiny`:
the logit lens, activation patching, steering and ablation."""

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
def next_probs(tiny) -> Callable[..., list[float]]:
    """Return the probability of each word as the next word."""

    def next_word_probs(logits: torch.Tensor, *words: str) -> list[float]:
        ids = [tiny.tokenizer.encode(word)[0] for word in words]
        return logits[0, -1].softmax(-1)[ids].tolist()

    return next_word_probs


def stream(model: Llama) -> list[str]:
    """Return the names of the residual stream from the first layer to the last."""
    return ["embed", *(f"layers.{i}" for i in range(len(model.layers)))]


def ablate(model: Llama, name: str, *heads: int) -> AbstractContextManager[None]:
    """Set the output of some heads to zero."""
    kept = torch.ones(model.config.num_attention_heads, 1)
    kept[list(heads)] = 0
    return edit(model, name, lambda x: x * kept)


def test_the_logit_lens_approaches_the_output_with_every_layer(tiny, model, encode):
    story = tiny.generate("Once upon a time", temperature=0, max_new_tokens=120)
    tokens = encode(f"Once upon a time{story.text}")
    with capture(model, *stream(model)) as seen:
        logits = model(tokens)
    lens = [model.lm_head(model.norm(seen[name])) for name in stream(model)]
    assert torch.equal(lens[0].argmax(-1), tokens)  # tied: an embedding is nearest to itself
    assert torch.equal(lens[-1], logits)
    agreement = [(x.argmax(-1) == logits.argmax(-1)).float().mean().item() for x in lens]
    assert agreement == sorted(agreement)
    assert agreement[1] < 0.25
    assert agreement[-2] > 2 * agreement[1]


def test_patching_the_whole_stream_at_any_layer_gives_the_other_run(model, encode):
    dog, cat = encode(TEXT.format("dog")), encode(TEXT.format("cat"))
    with capture(model, *stream(model)) as seen:
        expected = model(cat)
    assert not torch.allclose(model(dog), expected)
    for name in stream(model):
        with edit(model, name, lambda _, x=seen[name]: x):
            assert torch.equal(model(dog), expected), name


@pytest.mark.parametrize(
    ("layer", "place", "share"), [(4, "word", 1), (4, "end", 0), (5, "word", 0), (5, "end", 1)]
)
def test_the_last_layer_moves_the_animal_from_the_word_to_the_end(
    model, encode, next_probs, layer, place, share
):
    def gap(logits):
        cat, dog = torch.tensor(next_probs(logits, " cat", " dog")).log()
        return cat - dog

    texts = dog, cat = encode(TEXT.format("dog")), encode(TEXT.format("cat"))
    with capture(model, f"layers.{layer}") as seen:
        start, end = (gap(model(text)) for text in texts)
    x, other = (x.clone() for x in seen.passes[f"layers.{layer}"])
    t = -1 if place == "end" else int((dog != cat).nonzero()[0, 1])
    x[:, t] = other[:, t]
    with edit(model, f"layers.{layer}", lambda _: x):
        moved = (gap(model(dog)) - start) / (end - start)
    assert moved.item() == pytest.approx(float(share), abs=0.05)


def test_steering_makes_sad_words_likelier_and_happy_words_less_likely(model, encode, next_probs):
    def mean(text):
        with capture(model, "layers.2") as seen:
            model(encode(text))
        return seen["layers.2"][0, 1:].mean(0)

    sad = mean("Lily was very sad. She cried. Tim lost his toy. He was so sad that he cried.")
    happy = mean("Lily was very happy. She smiled. Tim got a toy. He was so happy that he laughed.")
    tokens, probs = encode("One day, Lily went to the park. She was very"), []
    for strength in (-1.0, 0.0, 1.0, 2.0):
        with edit(model, "layers.2", lambda x, step=strength * (sad - happy): x + step):
            probs.append(next_probs(model(tokens), " sad", " happy", " excited"))
    sad_probs = [sad for sad, *_ in probs]
    happy_probs = [happy + excited for _, happy, excited in probs]
    assert sad_probs == sorted(sad_probs)
    assert happy_probs == sorted(happy_probs, reverse=True)
    assert sad_probs[1] < 0.01 < 0.1 < sad_probs[2]
    assert happy_probs[3] < 0.1 < 0.7 < happy_probs[1]


def test_attention_with_all_heads_ablated_adds_nothing(model, encode):
    tokens, H = encode(TEXT.format("dog")), model.config.num_attention_heads
    nothing = model(tokens, attend=lambda q, k, v: torch.zeros_like(q))
    with ablate(model, "layers.*.attn.heads", *range(H)):
        assert torch.equal(model(tokens), nothing)
    with ablate(model, "layers.*.attn.heads", *range(1, H)):
        assert not torch.allclose(model(tokens), nothing)


def test_two_heads_of_the_last_layer_carry_the_animal(model, encode, next_probs):
    tokens, name = encode(TEXT.format("dog")), "layers.5.attn.heads"
    for heads, low, high in [((), 0.9, 1), ((0, 2, 4, 5, 6, 7), 0.5, 1), ((1, 3), 0, 0.05)]:
        with ablate(model, name, *heads):
            (dog,) = next_probs(model(tokens), " dog")
        assert low < dog < high, heads
