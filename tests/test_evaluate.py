import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import llama32
from llama32.evaluate import Perplexity, perplexity, token_losses
from llama32.loading import load
from llama32.saving import save
from tests.alphabet import alphabet_checkpoint
from tests.checkpoints import random_model, tiny_config
from tests.tokenizers import write_tokenizer_json

CONTEXT = 32
STORY = (
    "Once upon a time, there was a little dog named Max. Max had a red ball. One day, the ball "
    "rolled under a big tree. Max was sad. A girl named Lily saw Max and got the ball for him. "
    "Max was happy and wagged his tail. Max and Lily played with the ball all day."
)
WINDOWS = [(8, 1), (8, 3), (8, 8), (9, 4), (32, 16), (32, 31), (1, 1)]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocab_size=100, max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """One that knows the byte after each byte, with a begin-of-text token."""
    return load(alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=64))


def draw(count: int, seed: int = 0) -> list[int]:
    return torch.randint(100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def one_by_one(model, ids: list[int], context: int, stride: int) -> torch.Tensor:
    """Each token by a forward pass of its own, from the first window that reaches up to it.
    Windows begin at 0, `stride`, 2 * `stride`, ..."""
    losses = []
    for i in range(1, len(ids)):
        begin = next(begin for begin in range(0, i, stride) if i <= begin + context)
        logits = model(torch.tensor(ids[begin:i]))[-1]
        losses.append(-logits.log_softmax(-1)[ids[i]])
    return torch.stack(losses).detach()


@pytest.mark.parametrize("length", [2, 9, 33, 70])
@pytest.mark.parametrize(("context", "stride"), WINDOWS)
def test_each_token_is_predicted_as_one_by_one_from_its_window(model, context, stride, length):
    ids = draw(length)
    losses = token_losses(model, ids, context=context, stride=stride)
    torch.testing.assert_close(losses, one_by_one(model, ids, context, stride), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("context", "stride"), WINDOWS)
def test_each_token_is_predicted_once_from_the_context_it_is_promised(
    model, context, stride, monkeypatch
):
    ids, seen = draw(70), []
    forward = type(model).forward

    def listening(self, tokens, *args, rows, **kwargs):
        logits = forward(self, tokens, *args, rows=rows, **kwargs)
        seen.append((len(tokens), len(logits)))
        return logits

    monkeypatch.setattr(type(model), "forward", listening)
    losses = token_losses(model, ids, context=context, stride=stride)
    assert sum(predicted for _, predicted in seen) == len(losses) == len(ids) - 1
    done = 0
    for length, predicted in seen:
        assert length <= context
        assert predicted <= stride
        assert length - predicted + 1 >= min(context - stride + 1, done + 1)
        done += predicted


def test_what_the_last_token_alone_decides_is_the_same_in_all_windows(llm):
    ids = [*b"abcxyzaabbcc" * 5]
    whole = token_losses(llm.model, ids, context=64, stride=64)
    assert len(set(whole.tolist())) > 1
    for context in (1, 2, 7, 64):
        for stride in range(1, context + 1):
            assert token_losses(llm.model, ids, context=context, stride=stride).equal(whole)


def test_a_stride_of_the_context_reads_disjoint_windows(model):
    ids = draw(70)
    losses = token_losses(model, ids, context=16, stride=16)
    windows = [ids[begin : begin + 17] for begin in range(0, len(ids) - 1, 16)]
    alone = [token_losses(model, window, context=16, stride=16) for window in windows]
    assert losses.equal(torch.cat(alone))


def test_more_context_is_what_a_smaller_stride_gives():
    llm = load("tiny")
    coarse, fine = (perplexity(llm, STORY, context=16, stride=stride) for stride in (16, 2))
    assert fine.perplexity < coarse.perplexity
    assert fine.num_tokens == coarse.num_tokens


def test_one_window_is_the_mean_loss(model):
    ids = draw(CONTEXT + 1)
    tokens = torch.tensor(ids)
    losses = F.cross_entropy(model(tokens[:-1]), tokens[1:], reduction="none").double()
    found = Perplexity.of(model, ids, context=CONTEXT, stride=CONTEXT)
    assert found.nats_per_token == losses.mean().item()
    assert found.perplexity == math.exp(found.nats_per_token)
    assert (found.num_tokens, found.num_bytes, found.bits_per_byte) == (CONTEXT, None, None)


def test_windows_are_as_long_as_the_model_takes_and_overlap_by_half(model):
    ids = draw(70)
    found = Perplexity.of(model, ids)
    assert found == Perplexity.of(model, ids, context=CONTEXT, stride=CONTEXT // 2)
    assert (found.context, found.stride) == (CONTEXT, CONTEXT // 2)
    longer = random_model(tiny_config(vocab_size=100))
    found = Perplexity.of(longer, ids)
    assert (found.context, found.stride) == (2048, 1024)
    assert Perplexity.of(longer, ids, context=1).stride == 1


def test_low_precision_ends_at_the_logits(model):
    half = random_model(model.config, dtype=torch.bfloat16)
    ids = draw(CONTEXT + 1)
    tokens = torch.tensor(ids)
    logits = half(tokens[:-1]).detach().float()
    found = token_losses(half, ids, context=CONTEXT, stride=CONTEXT)
    assert found.equal(F.cross_entropy(logits, tokens[1:], reduction="none"))


def test_progress_counts_the_tokens(model):
    heard = []
    token_losses(
        model, draw(40), context=16, stride=16, on_progress=lambda *told: heard.append(told)
    )
    assert heard == [(16, 39), (32, 39), (39, 39)]


def test_nothing_of_it_is_recorded_for_a_gradient(model):
    losses = token_losses(model, draw(20))
    assert not losses.requires_grad
    assert not losses.is_inference()


# text


@pytest.mark.parametrize("text", ["a story", "Ein Märchen: 猫と犬 🐕", "\n"])
def test_a_text_begins_with_the_begin_token_which_is_not_predicted(llm, text):
    found = perplexity(llm, text)
    ids = [llm.tokenizer.bos_id, *text.encode()]
    assert found == Perplexity.of(llm.model, ids, num_bytes=len(text.encode()))
    assert found.num_tokens == len(text.encode())


@pytest.mark.parametrize("text", ["a story", "Ein Märchen: 猫と犬 🐕"])
def test_bits_per_byte_are_all_bits_over_all_bytes(text):
    found = perplexity(load("tiny"), text)
    bits = found.nats_per_token * found.num_tokens / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=1e-12)
    assert found.num_tokens < len(text.encode())


def test_without_a_begin_token_the_first_token_and_its_bytes_do_not_count(llm, tmp_path):
    write_tokenizer_json(tmp_path, [(b"a", b"b")])
    save(random_model(tiny_config(vocab_size=300)), tmp_path)
    bare = load(tmp_path)
    found = perplexity(bare, "abcd")
    assert (found.num_tokens, found.num_bytes) == (2, 2)
    with pytest.raises(ValueError, match="ids: 1 are given; give 2 or more"):
        perplexity(bare, "ab")


def test_the_text_of_a_control_token_is_text(llm):
    assert perplexity(llm, "<|eot_id|>").num_tokens == len("<|eot_id|>")


# what cannot be


@pytest.mark.parametrize(
    ("ids", "given", "complaint"),
    [
        ([], {}, "ids: 0 are given; give 2 or more"),
        ([7], {}, "ids: 1 are given; give 2 or more"),
        ([7, 100], {}, "ids: token id 100 is outside the vocabulary of 100"),
        ([7, -1], {}, "ids: token id -1 is outside"),
        ([7, 8], {"context": CONTEXT + 1}, "context is 33, allowed: 1 to the model's 32"),
        ([7, 8], {"context": 0}, "context is 0, allowed: 1 to"),
        ([7, 8], {"stride": 0}, "stride is 0, allowed: 1 to the context, 32"),
        ([7, 8], {"context": 8, "stride": 9}, "stride is 9, allowed: 1 to the context, 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, ids, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        Perplexity.of(model, ids, **given)


def test_an_empty_text_and_a_missing_tokenizer_are_refused(llm, model):
    with pytest.raises(ValueError, match="text: it is empty"):
        perplexity(llm, "")
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity(llama32.LLM(model, None, None), "a")


def test_weights_that_are_not_sound_are_told_and_not_averaged(model):
    broken = random_model(model.config)
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        token_losses(broken, draw(20))


# parity


@pytest.mark.parametrize("stride", [1, 7, 16, 32])
@pytest.mark.parametrize("length", [20, 80])
def test_losses_are_those_of_transformers(model, tmp_path, length, stride):
    """Its logits, in windows of which each is read whole."""
    save(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.tensor(draw(length))
    expected = tokens.new_empty(0, dtype=torch.float32)
    for begin in range(0, length, stride):
        window = tokens[begin : begin + CONTEXT + 1]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        expected = torch.cat((expected, losses[len(expected) - begin :]))
        if len(expected) == length - 1:
            break
    found = token_losses(model, tokens.tolist(), context=CONTEXT, stride=stride)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
