"""Grammars: the tokens that may follow, and finished outputs in the given form."""

import json
import re
from enum import Enum

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

import llama32
from llama32 import Engine, EngineSettings, Grammar, PromptLookup, Sampling
from llama32.llm.llm import LLM
from llama32.sampling import mask_disallowed
from llama32.text.grammar import GrammarCompiler
from llama32.text.tokenizer import Tokenizer
from tests.tokenizers import byte_tokenizer_json


class Mood(Enum):
    glad = "glad"
    sad = "sad"


class Story(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hero: str = Field(max_length=12)  # without a limit, tiny writes a whole story here
    age: int = Field(ge=0, le=99)
    mood: Mood
    friends: list[Mood] = Field(max_length=2)


SCHEMA = Grammar.json(Story.model_json_schema())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer_json(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, {tokenizer.special["<|eot_id|>"]})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llama32.load("tiny")


def allowed(matcher, tokenizer) -> set[str]:
    bits = torch.frombuffer(bytearray(matcher.allowed()), dtype=torch.uint8)
    each = (bits.unsqueeze(-1) >> torch.arange(8) & 1).flatten().nonzero().flatten()
    return {tokenizer.decode([id]) for id in each.tolist()}


def test_a_choice_continues_as_one_of_the_texts_and_ends(compiler, tokenizer):
    matcher = compiler.matcher(Grammar.choice(["yes", "yet"]))
    steps = []
    for byte in b"yet":
        steps.append(allowed(matcher, tokenizer))
        assert not matcher.is_finished
        matcher.push(byte)
    assert steps == [{"y"}, {"e"}, {"s", "t"}]
    assert matcher.is_finished


def test_a_complete_text_may_continue_or_end(compiler, tokenizer):
    matcher = compiler.matcher(Grammar.regex("a+"))
    matcher.push(ord("a"))
    assert allowed(matcher, tokenizer) == {"a", "<|eot_id|>"}
    assert not matcher.is_finished
    matcher.push(tokenizer.special["<|eot_id|>"])
    assert matcher.is_finished


def test_control_tokens_do_not_match_text(compiler, tokenizer):
    matcher = compiler.matcher(Grammar.regex(r"(.|\n)*"))
    special = {name for name in tokenizer.special if name != "<|eot_id|>"}
    assert not allowed(matcher, tokenizer) & special


def test_matchers_of_one_grammar_are_independent(compiler, tokenizer):
    first, second = (compiler.matcher(Grammar.choice(["ab", "cd"])) for _ in range(2))
    first.push(ord("a"))
    assert allowed(first, tokenizer) == {"b"}
    assert allowed(second, tokenizer) == {"a", "c"}


def test_a_token_that_is_not_allowed_raises(compiler):
    matcher = compiler.matcher(Grammar.choice(["ab"]))
    with pytest.raises(ValueError, match="the grammar does not allow token 120"):
        matcher.push(ord("x"))


@pytest.mark.parametrize(
    "grammar",
    [Grammar.regex("("), Grammar.json({"type": "nothing"}), Grammar.json({"$ref": "#/nowhere"})],
)
def test_an_invalid_grammar_is_refused_in_one_line(compiler, grammar):
    with pytest.raises(ValueError, match=r"^grammar: .+"):
        compiler.matcher(grammar)


@pytest.mark.parametrize("texts", [[], "yes", ["yes", ""]])
def test_a_choice_must_be_a_list_of_texts(texts):
    with pytest.raises(ValueError, match="not a list of texts"):
        Grammar.choice(texts)


def test_bits_mask_the_logits():
    logits = torch.zeros(3, 12)
    masked = mask_disallowed(logits, [None, bytes([0b101, 0b1000]), bytes([1])])
    finite = [row.isfinite().nonzero().flatten().tolist() for row in masked]
    assert finite == [[*range(12)], [0, 2, 11], [0]]
    assert logits.eq(0).all()
    assert mask_disallowed(logits, [None] * 3) is logits


@pytest.mark.parametrize("temperature", [0, 0.6, 1.5])
def test_finished_outputs_match_the_grammar_at_any_temperature(llm, temperature):
    settings = [
        Sampling(grammar=grammar, temperature=temperature, seed=seed, max_new_tokens=150)
        for seed in range(6)
        for grammar in (SCHEMA, Grammar.json(), Grammar.regex(r"\d{3}-[a-c]{1,9}!"), None)
    ]
    results = llm.generate(["Once upon a time"] * len(settings), settings, progress=False)
    ended = [0, 0, 0]
    for sampling, result in zip(settings, results, strict=True):
        assert result.finish_reason in ("stop", "length")
        if result.finish_reason == "length" or sampling.grammar is None:
            continue
        if sampling.grammar == SCHEMA:
            Story.model_validate_json(result.text)
            ended[0] += 1
        elif sampling.grammar.kind == "json_schema":
            assert isinstance(json.loads(result.text), dict)
            ended[1] += 1
        else:
            assert re.fullmatch(r"\d{3}-[a-c]{1,9}!", result.text)
            ended[2] += 1
    assert ended[0] == ended[2] == 6


def test_the_last_token_of_a_choice_is_text_and_ends_the_output(llm):
    result = llm.generate("She said", grammar=Grammar.choice(["yes", "no"]), temperature=2, seed=1)
    assert result.text in ("yes", "no")
    assert result.finish_reason == "stop"
    assert llm.tokenizer.decode(result.ids) == result.text


def test_max_new_tokens_ends_an_unfinished_form_with_length(llm):
    result = llm.generate("A", grammar=Grammar.regex("a{50}b"), max_new_tokens=5, temperature=0)
    assert result.finish_reason == "length"
    assert re.fullmatch("a+", result.text)


def test_a_grammar_does_not_change_other_requests_in_the_batch(llm):
    plain = Sampling(temperature=0.8, seed=3, max_new_tokens=30)
    alone = llm.generate("Once", plain).ids
    batch = [plain, Sampling(grammar=SCHEMA, seed=1, max_new_tokens=30), plain]
    results = llm.generate(["Once"] * 3, batch, progress=False)
    assert [results[0].ids, results[2].ids] == [alone] * 2


def test_speculation_of_other_requests_does_not_change_the_text(llm):
    structured = Sampling(grammar=SCHEMA, seed=5, temperature=1, max_new_tokens=40)
    settings = EngineSettings(speculation=PromptLookup(num_tokens=4), cache_tokens=4096)
    drafting = llama32.load("tiny", engine=settings)
    sampling = [structured, Sampling(temperature=0, max_new_tokens=40)]
    prompts = ["They climbed the tree. " * 4] * 2
    expected = llm.generate(prompts, sampling, progress=False)
    results = drafting.generate(prompts, sampling, progress=False)
    assert [r.ids for r in results] == [r.ids for r in expected]
    assert drafting.engine.stats.accepted > 0


def test_a_grammar_that_fails_midway_fails_only_its_request(llm):
    class Fails:
        is_finished = False

        def allowed(self) -> None:
            return None

        def push(self, id: int) -> None:
            raise ValueError("too large")

    engine = Engine.of(llm.model, EngineSettings(cache_tokens=1024))
    broken = engine.add([1, 2, 3], Sampling(max_new_tokens=3), matcher=Fails())
    fine = engine.add([1, 2, 3], Sampling(max_new_tokens=3, ignore_eos=True))
    while engine.is_busy:
        engine.step()
    assert (broken.finish_reason, str(broken.error)) == ("error", "too large")
    assert fine.finish_reason == "length"
    assert engine.stats.pages_held == 0
