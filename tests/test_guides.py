"""Outputs of a given form: which tokens may follow, and that what is finished is of that form."""

import json
import re
from enum import Enum

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

import llama32
from llama32 import Engine, EngineSettings, Grammar, PromptLookup, Sampling
from llama32.guides import Guides
from llama32.llm import LLM
from llama32.sampling import only_allowed
from llama32.tokenizer import Tokenizer
from tests.tokenizers import byte_tokenizer_json


class Mood(Enum):
    glad = "glad"
    sad = "sad"


class Story(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hero: str = Field(max_length=12)  # left alone, tiny tells its whole story here
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
def guides(tokenizer) -> Guides:
    return Guides(tokenizer, {tokenizer.special["<|eot_id|>"]})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llama32.load("tiny")


def allowed(guide, tokenizer) -> set[str]:
    bits = torch.frombuffer(bytearray(guide.allowed()), dtype=torch.uint8)
    each = (bits.unsqueeze(-1) >> torch.arange(8) & 1).flatten().nonzero().flatten()
    return {tokenizer.decode([id]) for id in each.tolist()}


def test_a_choice_goes_on_as_one_of_its_texts_and_ends(guides, tokenizer):
    guide = guides.guide(Grammar.choice(["yes", "yet"]))
    seen = []
    for byte in b"yet":
        seen.append(allowed(guide, tokenizer))
        assert not guide.is_finished
        guide.push(byte)
    assert seen == [{"y"}, {"e"}, {"s", "t"}]
    assert guide.is_finished


def test_a_text_that_could_go_on_may_also_end(guides, tokenizer):
    guide = guides.guide(Grammar.regex("a+"))
    guide.push(ord("a"))
    assert allowed(guide, tokenizer) == {"a", "<|eot_id|>"}
    assert not guide.is_finished
    guide.push(tokenizer.special["<|eot_id|>"])
    assert guide.is_finished


def test_control_tokens_are_no_text(guides, tokenizer):
    guide = guides.guide(Grammar.regex(r"(.|\n)*"))
    special = {name for name in tokenizer.special if name != "<|eot_id|>"}
    assert not allowed(guide, tokenizer) & special


def test_guides_of_one_grammar_go_their_own_ways(guides, tokenizer):
    first, second = (guides.guide(Grammar.choice(["ab", "cd"])) for _ in range(2))
    first.push(ord("a"))
    assert allowed(first, tokenizer) == {"b"}
    assert allowed(second, tokenizer) == {"a", "c"}


def test_what_is_not_allowed_is_refused(guides):
    guide = guides.guide(Grammar.choice(["ab"]))
    with pytest.raises(ValueError, match="the grammar does not go on"):
        guide.push(ord("x"))


@pytest.mark.parametrize(
    "grammar",
    [Grammar.regex("("), Grammar.json({"type": "nothing"}), Grammar.json({"$ref": "#/nowhere"})],
)
def test_a_grammar_that_is_none_is_refused_in_one_line(guides, grammar):
    with pytest.raises(ValueError, match=r"^grammar: .+"):
        guides.guide(grammar)


@pytest.mark.parametrize("texts", [[], "yes", ["yes", ""]])
def test_a_choice_is_among_texts(texts):
    with pytest.raises(ValueError, match="not a list of texts"):
        Grammar.choice(texts)


def test_bits_say_what_may_be_chosen():
    logits = torch.zeros(3, 12)
    found = only_allowed(logits, [None, bytes([0b101, 0b1000]), bytes([1])])
    finite = [row.isfinite().nonzero().flatten().tolist() for row in found]
    assert finite == [[*range(12)], [0, 2, 11], [0]]
    assert logits.eq(0).all()
    assert only_allowed(logits, [None] * 3) is logits


@pytest.mark.parametrize("temperature", [0, 0.6, 1.5])
def test_what_is_finished_is_of_its_form_at_any_temperature(llm, temperature):
    asked = [
        Sampling(grammar=grammar, temperature=temperature, seed=seed, max_new_tokens=150)
        for seed in range(6)
        for grammar in (SCHEMA, Grammar.json(), Grammar.regex(r"\d{3}-[a-c]{1,9}!"), None)
    ]
    results = llm.generate(["Once upon a time"] * len(asked), asked, progress=False)
    ended = [0, 0, 0]
    for one, result in zip(asked, results, strict=True):
        assert result.finish_reason in ("stop", "length")
        if result.finish_reason == "length" or one.grammar is None:
            continue
        if one.grammar == SCHEMA:
            Story.model_validate_json(result.text)
            ended[0] += 1
        elif one.grammar.kind == "json_schema":
            assert isinstance(json.loads(result.text), dict)
            ended[1] += 1
        else:
            assert re.fullmatch(r"\d{3}-[a-c]{1,9}!", result.text)
            ended[2] += 1
    assert ended[0] == ended[2] == 6


def test_the_last_token_of_a_form_is_text_and_ends_it(llm):
    result = llm.generate("She said", grammar=Grammar.choice(["yes", "no"]), temperature=2, seed=1)
    assert result.text in ("yes", "no")
    assert result.finish_reason == "stop"
    assert llm.tokenizer.decode(result.ids) == result.text


def test_too_few_tokens_for_a_form_are_a_matter_of_length(llm):
    result = llm.generate("A", grammar=Grammar.regex("a{50}b"), max_new_tokens=5, temperature=0)
    assert result.finish_reason == "length"
    assert re.fullmatch("a+", result.text)


def test_others_in_the_batch_do_not_notice(llm):
    plain = Sampling(temperature=0.8, seed=3, max_new_tokens=30)
    alone = llm.generate("Once", plain).ids
    among = [plain, Sampling(grammar=SCHEMA, seed=1, max_new_tokens=30), plain]
    found = llm.generate(["Once"] * 3, among, progress=False)
    assert [found[0].ids, found[2].ids] == [alone] * 2


def test_with_drafts_for_others_the_same_text_comes(llm):
    one = Sampling(grammar=SCHEMA, seed=5, temperature=1, max_new_tokens=40)
    settings = EngineSettings(speculation=PromptLookup(num_tokens=4), cache_tokens=4096)
    drafting = llama32.load("tiny", engine=settings)
    asked = [one, Sampling(temperature=0, max_new_tokens=40)]
    text = ["They climbed the tree. " * 4] * 2
    expected = llm.generate(text, asked, progress=False)
    found = drafting.generate(text, asked, progress=False)
    assert [r.ids for r in found] == [r.ids for r in expected]
    assert drafting.engine.stats.accepted > 0


def test_a_grammar_that_fails_midway_is_an_error_of_its_request(llm):
    class Fails:
        is_finished = False

        def allowed(self) -> None:
            return None

        def push(self, id: int) -> None:
            raise ValueError("too large")

    engine = Engine.of(llm.model, EngineSettings(cache_tokens=1024))
    broken = engine.add([1, 2, 3], Sampling(max_new_tokens=3), guide=Fails())
    fine = engine.add([1, 2, 3], Sampling(max_new_tokens=3, ignore_eos=True))
    while engine.is_busy:
        engine.step()
    assert (broken.finish_reason, str(broken.error)) == ("error", "too large")
    assert fine.finish_reason == "length"
    assert engine.stats.pages_held == 0
