import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama32.checkpoint.writer import save
from llama32.engine.settings import EngineSettings
from llama32.llm.candidates import mean_logprob
from llama32.llm.llm import LLM
from llama32.llm.loading import assemble, eos_ids, has_chat_template, load
from llama32.llm.result import Result, Usage
from llama32.sampling import derive_seed
from llama32.sampling_params import Sampling
from llama32.text.tokenizer import Tokenizer
from llama32.text.tools import Tools
from tests.alphabet import ALPHABET, alphabet_checkpoint
from tests.checkpoints import edit_json, random_model, tiny_config

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return alphabet_checkpoint(tmp_path_factory.mktemp("alphabet"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return load(folder)


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """A checkpoint for the test to change."""
    return alphabet_checkpoint(tmp_path, max_position_embeddings=64)


def special(llm: LLM, text: str) -> int:
    assert llm.tokenizer
    return llm.tokenizer.special[text]


def without_tokenizer(llm: LLM) -> LLM:
    return dataclasses.replace(llm, tokenizer=None, chat_format=None)


def test_a_result_holds_text_ids_finish_reason_and_usage(llm):
    result = llm.generate("a", max_new_tokens=3)
    assert (result.text, result.ids, result.finish_reason) == ("bcd", [*b"bcd"], "length")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2, 3)  # with a bos
    assert result.logprobs is None
    assert result.message is None


def test_token_ids_are_used_unchanged(llm):
    result = llm.generate([*b"xa"], max_new_tokens=2)
    assert result.text == "bc"
    assert result.usage.prompt_tokens == 2


def test_a_list_of_prompts_gives_a_list_of_results(llm):
    results = llm.generate(["a", [*b"p"], "x"], max_new_tokens=2)
    assert [result.text for result in results] == ["bc", "qr", "yz"]


def test_a_tokenizer_without_a_begin_token_adds_none(own_folder):
    edit_json(own_folder / "tokenizer.json", post_processor=None)
    assert load(own_folder).generate("a", max_new_tokens=1).usage.prompt_tokens == 1


def test_an_end_token_ends_the_text_and_is_not_part_of_the_text(llm):
    result = llm.generate("X", max_new_tokens=9)
    assert (result.text, result.finish_reason) == ("YZ", "stop")
    assert result.ids == [*b"YZ", special(llm, "<|eot_id|>")]
    assert "YZ<|eot_id|>" in llm.generate("X", max_new_tokens=9, ignore_eos=True).text


def test_the_end_of_the_context_ends_the_text(own_folder):
    result = load(own_folder).generate("a", max_new_tokens=1000)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens + result.usage.completion_tokens == 64


def test_pieces_join_to_the_text_and_never_end_inside_a_character(tmp_path):
    llm = load(alphabet_checkpoint(tmp_path, says="aé→z"))
    stream = llm.stream("\n")
    assert list(stream) == ["a", "é", "→", "z"]
    assert stream.result.text == "aé→z"
    cut = llm.stream("\n", max_new_tokens=4)
    assert list(cut) == ["a", "é", "\ufffd"]


def test_a_stop_string_across_tokens_ends_the_text(llm):
    stream = llm.stream("a", stop="fgh")
    assert list(stream) == ["b", "c", "d", "e"]
    assert stream.result.text == "bcde"
    assert stream.result.ids == [*b"bcdefgh"]
    assert stream.result.finish_reason == "stop"


def test_an_incomplete_stop_string_is_shown_at_the_end(llm):
    stream = llm.stream("a", stop=["efx", "zz"], max_new_tokens=5)
    assert list(stream) == ["b", "c", "d", "ef"]
    assert stream.result.finish_reason == "length"


def test_every_id_has_logprobs(llm):
    result = llm.generate("a", max_new_tokens=3, logprobs=2)
    assert [next(iter(token.top)) for token in result.logprobs] == result.ids
    assert {len(token.top) for token in result.logprobs} == {2}


def test_leaving_a_stream_early_gives_a_partial_result(llm):
    stream = llm.stream("a")
    for piece in stream:
        if piece == "d":
            break
    assert (stream.result.text, stream.result.finish_reason) == ("bcd", "abort")
    assert list(stream) == []
    assert stream.result == stream.run()


def test_an_unread_stream_has_an_empty_result(llm):
    result = llm.stream_chat(HELLO).result
    assert (result.text, result.ids, result.finish_reason) == ("", [], "abort")


def test_an_interrupt_inside_the_model_leaves_a_result(llm, monkeypatch):
    stream = llm.stream("a")
    pieces = iter(stream)
    assert next(pieces) + next(pieces) == "bc"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.model, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert (stream.result.text, stream.result.finish_reason) == ("bc", "abort")


def test_iterating_a_finished_stream_again_does_not_change_the_result(llm):
    stream = llm.stream("a", max_new_tokens=2)
    assert list(stream) == ["b", "c"]
    assert list(stream) == []
    assert stream.run().text == "bc"


def test_prefill_progress_is_reported(llm):
    reports = []
    llm.stream("a" * 600, max_new_tokens=1, on_prefill=lambda *report: reports.append(report)).run()
    assert reports == [(512, 601), (601, 601)]


def test_the_answer_of_a_chat_continues_the_dialog(llm):
    result = llm.chat(HELLO)
    assert (result.text, result.finish_reason) == (ALPHABET, "stop")
    assert result.message == {"role": "assistant", "content": ALPHABET, "tool_calls": []}
    more = llm.chat([*HELLO, result.message, *HELLO])
    assert more.usage.prompt_tokens > result.usage.prompt_tokens + len(ALPHABET)


def test_a_chat_streams(llm):
    stream = llm.stream_chat(HELLO, max_new_tokens=3)
    assert list(stream) == ["A", "B", "C"]
    assert stream.result.message["content"] == "ABC"


def test_a_stop_string_ends_the_message_too(llm):
    result = llm.chat(HELLO, stop="DE")
    assert result.text == result.message["content"] == "ABC"


def test_tools_and_date_reach_the_prompt(llm):
    tools = [{"type": "function", "function": {"name": "f"}}]
    result = llm.chat(HELLO, tools=tools, date="26 Jul 2024", max_new_tokens=1)
    ids = llm.chat_format.encode(HELLO, tools=tools, date="26 Jul 2024")
    assert result.usage.prompt_tokens == len(ids)
    assert len(ids) > len(llm.chat_format.encode(HELLO, date="26 Jul 2024"))


def test_a_tool_call_is_in_the_message(tmp_path):
    result = load(alphabet_checkpoint(tmp_path, says="[f(x=1)]")).chat(HELLO)
    assert result.text == "[f(x=1)]"
    [call] = result.message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}


def test_a_streamed_chat_shows_text_and_keeps_calls_for_the_message(tmp_path):
    caller = load(alphabet_checkpoint(tmp_path / "call", says="[f(x=1)]"))
    stream = caller.stream_chat(HELLO)
    assert [*stream] == []
    assert stream.result.text == "[f(x=1)]"
    assert stream.result.message["tool_calls"]
    cut = caller.stream_chat(HELLO, max_new_tokens=4)
    assert "".join(cut) == cut.result.text == cut.result.message["content"] == "[f(x"
    assert cut.result.call_problem.startswith("begins like a tool call, but cannot be parsed: ")
    talker = load(alphabet_checkpoint(tmp_path / "talk", says="[1, 2]"))
    pieces = [*talker.stream_chat(HELLO)]
    assert pieces[0] == "[1"
    assert "".join(pieces) == "[1, 2]"


def scripted(llm, monkeypatch, *answers: str) -> list[list]:
    """Make chats give the answers in order; returns the list of dialogs received."""
    dialogs, remaining = [], list(answers)

    def stream_chat(self, messages, sampling=None, **settings):
        dialogs.append([*messages])
        ids = llm.tokenizer.encode(remaining.pop(0))
        message, problem = llm.chat_format.parse_with_problem(ids)
        usage = Usage(1, 1)
        result = Result("", [], "stop", usage, message=message, call_problem=problem)
        return SimpleNamespace(run=lambda: result)

    monkeypatch.setattr(LLM, "stream_chat", stream_chat)
    return dialogs


def add(a: int, b: int) -> int:
    """Return the sum."""
    return a + b


def test_tools_are_run_until_there_is_an_answer(llm, monkeypatch):
    dialogs = scripted(llm, monkeypatch, "[add(a=1, b=2)]", "[add(a=3, b='x')]", "It is 3.")
    result = llm.chat(HELLO, tools=[add], run_tools=True)
    assert result.message["content"] == "It is 3."
    roles = [message["role"] for message in result.messages]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert result.messages[1]["content"] == "3"
    assert "b: Input should be a valid integer" in result.messages[3]["content"]
    assert dialogs == [HELLO, HELLO + result.messages[:2], HELLO + result.messages[:4]]
    llm.chat_format.encode([*HELLO, *result.messages], tools=[])


def test_rounds_of_tools_are_bounded(llm, monkeypatch):
    dialogs = scripted(llm, monkeypatch, *["[add(a=1, b=2)]"] * 9)
    result = llm.chat(HELLO, tools=[add], run_tools=True, max_rounds=2)
    assert len(dialogs) == 3
    assert result.message["tool_calls"]  # unanswered
    assert len(result.messages) == 5
    with pytest.raises(ValueError, match="max_rounds is -1, allowed: 0 or more"):
        llm.chat(HELLO, tools=[add], run_tools=True, max_rounds=-1)


def test_tools_are_only_run_on_request(llm, monkeypatch):
    scripted(llm, monkeypatch, *["[add(a=1, b=2)]"] * 2)
    assert len(llm.chat(HELLO, tools=[add]).messages) == 1
    schema = {"type": "function", "function": {"name": "add"}}
    assert len(llm.chat(HELLO, tools=[schema], run_tools=True).messages) == 1


def test_functions_reach_the_prompt_as_their_schema(llm):
    result = llm.chat(HELLO, tools=[add], date="26 Jul 2024", max_new_tokens=1)
    ids = llm.chat_format.encode(HELLO, tools=Tools([add]).schemas, date="26 Jul 2024")
    assert result.usage.prompt_tokens == len(ids)


def test_the_end_of_turn_ends_a_chat_even_without_eos_ids(llm):
    without_eos = dataclasses.replace(llm, eos_ids=())
    assert without_eos.chat(HELLO).text == ALPHABET
    assert without_eos.generate("X", max_new_tokens=9).finish_reason == "length"


def test_without_a_tokenizer_token_ids_go_in_and_out(llm):
    bare = without_tokenizer(llm)
    result = bare.generate([*b"a"], max_new_tokens=3)
    assert (result.ids, result.text, result.finish_reason) == ([*b"bcd"], "", "length")
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        bare.generate("a")
    with pytest.raises(ValueError, match="stop: this checkpoint has no tokenizer"):
        bare.generate([1], stop="x")


def test_chat_without_a_chat_format_is_refused(llm):
    with pytest.raises(ValueError, match="this checkpoint has no chat format"):
        without_tokenizer(llm).chat(HELLO)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(llm, prompt):
    with pytest.raises(ValueError, match="prompt: it is empty"):
        llm.generate(prompt)


def test_an_oversized_prompt_is_refused_before_iteration(llm):
    with pytest.raises(ValueError, match="no room for an answer"):
        llm.stream("a" * 3000)


def test_the_checkpoint_s_settings_can_be_changed_by_name_or_replaced(own_folder):
    config = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "eos_token_id": [7, 8]}
    (own_folder / "generation_config.json").write_text(json.dumps(config))
    llm = load(own_folder)
    assert llm.defaults == Sampling(temperature=0.5, top_p=0.9)
    assert llm.eos_ids == (7, 8)
    own = Sampling(max_new_tokens=2, temperature=0)
    assert llm.generate("a", own).text == "bc"
    assert llm.generate("a", own, max_new_tokens=1).text == "b"
    with pytest.raises(ValueError, match="temperature is -1"):
        llm.generate("a", temperature=-1)


def test_an_unknown_setting_is_refused_by_name(llm):
    for call in (llm.generate, llm.stream):
        with pytest.raises(TypeError, match="temprature"):
            call("a", temprature=1)
    with pytest.raises(TypeError, match="temprature"):
        llm.chat(HELLO, temprature=1)


def test_loading_accepts_a_dtype_and_reports_progress(folder):
    reports = []
    llm = load(folder, dtype=torch.bfloat16, on_progress=lambda *report: reports.append(report))
    assert llm.model.norm.weight.dtype == torch.bfloat16
    assert llm.generate("a", max_new_tokens=3).text == "bcd"
    done, total = reports[-1]
    assert done == total == sum(w.nbytes for w in load(folder).model.parameters())


def test_a_tokenizer_larger_than_the_embedding_is_refused(own_folder):
    small = random_model(tiny_config(vocab_size=100))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the embedding only 100 rows"):
        assemble(own_folder, small)
    save(small, own_folder)
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        load(own_folder)


def test_a_folder_without_tokenizer_loads(tmp_path):
    save(random_model(tiny_config()), tmp_path)
    llm = load(tmp_path)
    assert (llm.tokenizer, llm.chat_format, llm.eos_ids) == (None, None, (2, 3))
    assert len(llm.generate([5], max_new_tokens=3, ignore_eos=True).ids) == 3


def test_the_chat_style_can_be_chosen(own_folder):
    (own_folder / "tokenizer_config.json").unlink()
    assert load(own_folder).chat_format is None
    hub, meta = (load(own_folder, chat_style=style).chat_format for style in ("hub", "meta"))
    assert hub
    assert meta
    assert len(hub.encode(HELLO, date="26 Jul 2024")) > len(meta.encode(HELLO))
    with pytest.raises(ValueError, match="unknown style 'other'"):
        load(own_folder, chat_style="other")


def test_a_template_in_the_format_of_llama_3_makes_a_chat(own_folder):
    tokenizer = Tokenizer.load(own_folder)
    assert has_chat_template(own_folder, tokenizer)
    edit_json(own_folder / "tokenizer_config.json", chat_template="<|im_start|>")
    assert not has_chat_template(own_folder, tokenizer)
    (own_folder / "chat_template.jinja").write_text("{{ '<|start_header_id|>' }}")
    assert has_chat_template(own_folder, tokenizer)


def test_control_tokens_make_a_chat_only_in_meta_s_layout(own_folder):
    tokenizer = Tokenizer.load(own_folder)
    (own_folder / "tokenizer_config.json").unlink()
    assert not has_chat_template(own_folder, tokenizer)  # a base model
    (own_folder / "tokenizer.json").rename(own_folder / "elsewhere.json")
    assert has_chat_template(own_folder, tokenizer)
    edit_json(own_folder / "elsewhere.json", added_tokens=[], post_processor=None)
    assert not has_chat_template(own_folder, Tokenizer.load(own_folder / "elsewhere.json"))


def test_eos_comes_from_the_generation_config_else_the_config_else_the_tokenizer(llm):
    without_eos = dataclasses.replace(llm.config, eos_token_ids=())
    assert eos_ids({"eos_token_id": 7}, llm.config, llm.tokenizer) == (7,)
    assert eos_ids({"eos_token_id": [7, 8]}, llm.config, llm.tokenizer) == (7, 8)
    assert eos_ids({"eos_token_id": None}, llm.config, llm.tokenizer) == llm.config.eos_token_ids
    ends = [special(llm, end) for end in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    assert eos_ids({}, without_eos, llm.tokenizer) == (*ends,)
    assert eos_ids({}, without_eos, None) == ()


@pytest.fixture
def fragile(llm) -> Iterator[LLM]:
    """A model whose logits are nan after an e."""

    def spoil(_, args, x):
        return x.masked_fill((args[0] == ord("e")).unsqueeze(-1), math.nan)

    handle = llm.model.embed.register_forward_hook(spoil)
    yield llm
    handle.remove()


def greedy(max_new_tokens: int, **settings) -> Sampling:
    return Sampling(temperature=0, max_new_tokens=max_new_tokens, **settings)


def assert_idle(llm: LLM) -> None:
    stats = llm.engine.stats
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


def test_results_have_the_order_of_the_prompts_and_separate_settings(llm):
    prompts = ["a", [*b"xp"], "h", [*b"s"]]
    settings = [greedy(9), greedy(1, logprobs=0), greedy(5, stop="kl"), greedy(3)]
    results = llm.generate(prompts, settings)
    assert [result.text for result in results] == ["bcdefghij", "q", "ij", "tuv"]
    assert [result.finish_reason for result in results] == ["length", "length", "stop", "length"]
    assert [result.usage.prompt_tokens for result in results] == [2, 2, 2, 1]
    assert [result.logprobs is not None for result in results] == [False, True, False, False]
    assert_idle(llm)


def test_a_change_by_name_applies_to_the_settings_of_all_prompts(llm):
    results = llm.generate(["a", "p"], [greedy(9), greedy(1)], max_new_tokens=2)
    assert [result.text for result in results] == ["bc", "qr"]


def test_a_list_takes_no_more_steps_than_the_longest_output(llm):
    before = llm.engine.stats.steps
    llm.generate(["a", "p", "x"], [greedy(9), greedy(2), greedy(5)])
    assert llm.engine.stats.steps == before + 9


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_settings_must_match_the_prompts(llm, count):
    with pytest.raises(ValueError, match=f"sampling: {count} settings for 2 prompts"):
        llm.generate(["a", "p"], [greedy(2)] * count)
    assert [result.text for result in llm.generate(["a", "p"], greedy(2))] == ["bc", "qr"]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("", "prompt: it is empty"),
        ([], "prompt: it is empty"),
        ("a" * 3000, "no room for an answer"),
        ([5, 10**6], "token id 1000000 is outside"),
    ],
    ids=["no text", "no ids", "too long", "beyond"],
)
def test_a_list_with_an_invalid_prompt_is_refused_before_anything_runs(llm, bad, complaint):
    steps = llm.engine.stats.steps
    with pytest.raises(ValueError, match=complaint) as caught:
        llm.generate(["a", "p", bad, "x"], max_new_tokens=2)
    assert caught.value.__notes__ == ["This is prompt 2 of the list, counted from 0."]
    assert llm.engine.stats.steps == steps
    assert_idle(llm)


def test_a_failure_in_a_list_affects_a_single_prompt(fragile):
    results = fragile.generate(["p", "b", "f"], max_new_tokens=6, logprobs=0)
    assert [result.text for result in results] == ["qrstuv", "cde", "ghijkl"]
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert isinstance(results[1].error, FloatingPointError)
    assert [results[i].error for i in (0, 2)] == [None, None]
    assert results[1].usage.completion_tokens == len(results[1].logprobs) == 3
    assert_idle(fragile)


def test_a_stop_string_ends_only_the_output_of_the_same_request(llm):
    settings = [greedy(6), greedy(6, stop="de"), greedy(6, stop=["zz", "g"])]
    results = llm.generate(["a", "a", "a"], settings)
    assert [result.text for result in results] == ["bcdefg", "bc", "bcdef"]
    assert [result.finish_reason for result in results] == ["length", "stop", "stop"]


def test_a_shared_prefix_of_a_list_is_computed_once(llm):
    llm.engine.forget_prefixes()
    common = "xyz" * 50  # and a begin token: two pages, and 23 tokens of a third
    results = llm.generate([common + "a", common + "p", common + "h"], max_new_tokens=2)
    assert [result.text for result in results] == ["bc", "qr", "ij"]
    assert [result.usage.cached_tokens for result in results] == [0, 128, 128]


def test_an_interrupt_leaves_no_request_behind(llm, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.model, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "p"])
    assert_idle(llm)


@pytest.mark.parametrize("progress", [False, True])
def test_a_progress_bar_is_shown_on_request(llm, capsys, progress):
    llm.generate(["a", "p", "x"], max_new_tokens=2, progress=progress)
    llm.sample("a", 3, max_new_tokens=2, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("3/3") == 2 * progress
    assert bool(err) is progress


# At this temperature nearly all bytes are equally likely.
RANDOM = {"temperature": 12, "max_new_tokens": 8, "ignore_eos": True}


def test_samples_share_a_prompt_that_is_computed_once(llm):
    llm.engine.forget_prefixes()
    results = llm.sample("xyz" * 50, 4, **RANDOM)
    assert len({(*result.ids,) for result in results}) == 4
    assert [result.usage.cached_tokens for result in results] == [0, 128, 128, 128]
    assert {result.usage.prompt_tokens for result in results} == {151}
    assert {result.logprobs for result in results} == {None}


def test_the_seeds_of_samples_are_derived_from_the_seed_of_the_first(llm):
    samples = llm.sample("a", 4, seed=7, **RANDOM)
    assert samples == llm.sample("a", 4, seed=7, **RANDOM)
    assert samples[0] == llm.generate("a", seed=7, **RANDOM)
    for i, sample in enumerate(samples):
        assert sample.ids == llm.generate("a", seed=derive_seed(7, i), **RANDOM).ids
    assert samples[:2] == llm.sample("a", 2, seed=7, **RANDOM)
    assert len({(*sample.ids,) for sample in samples}) == 4


def test_without_a_seed_samples_differ_every_time(llm):
    assert llm.sample("a", 2, **RANDOM) != llm.sample("a", 2, **RANDOM)


def test_best_of_returns_the_highest_mean_logprobs_first(llm):
    settings = dict(RANDOM, seed=3, stop_ids=[*range(40, 200)])  # outputs of different lengths
    samples = llm.sample("a", 12, logprobs=0, **settings)
    assert len({len(sample.ids) for sample in samples}) > 2
    means = [sum(t.chosen for t in sample.logprobs) / len(sample.logprobs) for sample in samples]
    ranked = sorted(range(12), key=means.__getitem__, reverse=True)
    best = llm.sample("a", 3, best_of=12, **settings)
    assert [sample.ids for sample in best] == [samples[i].ids for i in ranked[:3]]
    assert [mean_logprob(sample) for sample in samples] == pytest.approx(means)
    assert llm.sample("a", 12, best_of=12, logprobs=0, **settings) == [samples[i] for i in ranked]


def test_the_logprobs_for_ranking_are_returned_only_on_request(llm):
    unasked = llm.sample("a", 2, best_of=3, **RANDOM)
    assert [sample.logprobs for sample in unasked] == [None, None]
    for num_top in (0, 2):
        for sample in llm.sample("a", 2, best_of=3, logprobs=num_top, **RANDOM):
            assert [len(token.top) for token in sample.logprobs] == [num_top] * 8


@pytest.mark.parametrize(("n", "best_of"), [(0, None), (-1, None), (0, 3), (3, 2), (1, 0)])
def test_fewer_candidates_than_samples_are_refused(llm, n, best_of):
    with pytest.raises(ValueError, match=f"sample: n is {n} and best_of {best_of}, allowed: 1 <="):
        llm.sample("a", n, best_of=best_of)
    assert_idle(llm)


def test_a_new_engine_is_created_only_after_the_model_has_moved(folder):
    llm = load(folder)
    first = llm.engine
    assert llm.generate("a", max_new_tokens=3).text == "bcd"
    assert llm.engine is first
    llm.model.to(torch.bfloat16)
    assert llm.generate("a", max_new_tokens=3).text == "bcd"
    assert llm.engine is not first
    with pytest.raises(RuntimeError, match="the engine is closed"):
        first.add([1])
    assert llm.engine is llm.engine


def test_a_new_engine_replaces_a_closed_engine(folder):
    llm = load(folder)
    first = llm.engine
    first.close()
    assert llm.engine is not first
    assert llm.generate("a", max_new_tokens=3).text == "bcd"


def test_the_engine_has_the_settings_given_to_load(folder):
    llm = load(folder, engine=EngineSettings(cache_tokens=640, max_running=2))
    assert llm.engine.stats.pages == 10
    results = llm.generate(["a"] * 5, max_new_tokens=3)
    assert [result.text for result in results] == ["bcd"] * 5
    assert llm.engine.stats.steps == 9
