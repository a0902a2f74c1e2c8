import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import llama32
from llama32.checkpoint.writer import save
from llama32.evaluation.perplexity import Perplexity, perplexity, token_losses
from llama32.llm.loading import load
from tests.alphabet import alphabet_checkpoint
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near
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
    """A model that predicts the next byte, with a begin-of-text token."""
    return load(alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=64))


def draw(count: int, seed: int = 0) -> list[int]:
    return torch.randint(100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_losses(model, ids: list[int], context: int, stride: int) -> torch.Tensor:
    """Predict each token in a separate forward pass, from the first window that covers the token.

    Windows begin at 0, `stride`, 2 * `stride`, ...
    """
    losses = []
    for i in range(1, len(ids)):
        begin = next(begin for begin in range(0, i, stride) if i <= begin + context)
        logits = model(torch.tensor(ids[begin:i]))[-1]
        losses.append(-logits.log_softmax(-1)[ids[i]])
    return torch.stack(losses).detach()


@pytest.mark.parametrize("length", [2, 9, 33, 70])
@pytest.mark.parametrize(("context", "stride"), WINDOWS)
def test_losses_equal_separate_forward_passes(model, context, stride, length):
    ids = draw(length)
    losses = token_losses(model, ids, context=context, stride=stride)
    assert_near(losses, expected_losses(model, ids, context, stride), within=2e-5)


@pytest.mark.parametrize(("context", "stride"), WINDOWS)
def test_each_token_is_predicted_once_with_the_promised_context(
    model, context, stride, monkeypatch
):
    ids, passes = draw(70), []
    forward = type(model).forward

    def record(self, tokens, *args, logits_at, **kwargs):
        logits = forward(self, tokens, *args, logits_at=logits_at, **kwargs)
        passes.append((len(tokens), len(logits)))
        return logits

    monkeypatch.setattr(type(model), "forward", record)
    losses = token_losses(model, ids, context=context, stride=stride)
    assert sum(predicted for _, predicted in passes) == len(losses) == len(ids) - 1
    done = 0
    for length, predicted in passes:
        assert length <= context
        assert predicted <= stride
        assert length - predicted + 1 >= min(context - stride + 1, done + 1)
        done += predicted


def test_a_model_that_reads_only_the_last_token_has_equal_losses_in_all_windows(llm):
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


def test_a_smaller_stride_gives_more_context():
    llm = load("tiny")
    coarse, fine = (perplexity(llm, STORY, context=16, stride=stride) for stride in (16, 2))
    assert fine.perplexity < coarse.perplexity
    assert fine.num_tokens == coarse.num_tokens


def test_one_window_is_the_mean_loss(model):
    ids = draw(CONTEXT + 1)
    tokens = torch.tensor(ids)
    losses = F.cross_entropy(model(tokens[:-1]), tokens[1:], reduction="none").double()
    result = Perplexity.of(model, ids, context=CONTEXT, stride=CONTEXT)
    assert result.nats_per_token == losses.mean().item()
    assert result.perplexity == math.exp(result.nats_per_token)
    assert (result.num_tokens, result.num_bytes, result.bits_per_byte) == (CONTEXT, None, None)


def test_default_windows_fill_the_context_and_overlap_by_half(model):
    ids = draw(70)
    result = Perplexity.of(model, ids)
    assert result == Perplexity.of(model, ids, context=CONTEXT, stride=CONTEXT // 2)
    assert (result.context, result.stride) == (CONTEXT, CONTEXT // 2)
    longer = random_model(tiny_config(vocab_size=100))
    result = Perplexity.of(longer, ids)
    assert (result.context, result.stride) == (2048, 1024)
    assert Perplexity.of(longer, ids, context=1).stride == 1


def test_low_precision_ends_at_the_logits(model):
    half = random_model(model.config, dtype=torch.bfloat16)
    ids = draw(CONTEXT + 1)
    tokens = torch.tensor(ids)
    logits = half(tokens[:-1]).detach().float()
    result = token_losses(half, ids, context=CONTEXT, stride=CONTEXT)
    assert result.equal(F.cross_entropy(logits, tokens[1:], reduction="none"))


def test_progress_counts_the_tokens(model):
    reports = []
    token_losses(
        model, draw(40), context=16, stride=16, on_progress=lambda *report: reports.append(report)
    )
    assert reports == [(16, 39), (32, 39), (39, 39)]


def test_losses_have_no_gradient_and_are_not_inference_tensors(model):
    losses = token_losses(model, draw(20))
    assert not losses.requires_grad
    assert not losses.is_inference()


# text


@pytest.mark.parametrize("text", ["a story", "Ein Märchen: 猫と犬 🐕", "\n"])
def test_the_begin_token_before_a_text_is_not_predicted(llm, text):
    result = perplexity(llm, text)
    ids = [llm.tokenizer.bos_id, *text.encode()]
    assert result == Perplexity.of(llm.model, ids, num_bytes=len(text.encode()))
    assert result.num_tokens == len(text.encode())


@pytest.mark.parametrize("text", ["a story", "Ein Märchen: 猫と犬 🐕"])
def test_bits_per_byte_are_all_bits_over_all_bytes(text):
    result = perplexity(load("tiny"), text)
    bits = result.nats_per_token * result.num_tokens / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=1e-12)
    assert result.num_tokens < len(text.encode())


def test_without_a_begin_token_the_first_token_and_its_bytes_do_not_count(llm, tmp_path):
    write_tokenizer_json(tmp_path, [(b"a", b"b")])
    save(random_model(tiny_config(vocab_size=300)), tmp_path)
    bare = load(tmp_path)
    result = perplexity(bare, "abcd")
    assert (result.num_tokens, result.num_bytes) == (2, 2)
    with pytest.raises(ValueError, match="ids: 1 are given; give 2 or more"):
        perplexity(bare, "ab")


def test_the_text_of_a_control_token_is_text(llm):
    assert perplexity(llm, "<|eot_id|>").num_tokens == len("<|eot_id|>")


# errors


@pytest.mark.parametrize(
    ("ids", "options", "complaint"),
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
def test_invalid_ids_and_windows_are_refused(model, ids, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Perplexity.of(model, ids, **options)


def test_an_empty_text_and_a_missing_tokenizer_are_refused(llm, model):
    with pytest.raises(ValueError, match="text: it is empty"):
        perplexity(llm, "")
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity(llama32.LLM(model, None, None), "a")


def test_nan_weights_raise_an_error(model):
    broken = random_model(model.config)
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        token_losses(broken, draw(20))


# parity


@pytest.mark.parametrize("stride", [1, 7, 16, 32])
@pytest.mark.parametrize("length", [20, 80])
def test_losses_are_those_of_transformers(model, tmp_path, length, stride):
    """Logits of transformers, in windows that are each read whole."""
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
    result = token_losses(model, tokens.tolist(), context=CONTEXT, stride=stride)
    assert_near(result, expected, within=2e-5)
