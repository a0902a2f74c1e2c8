import dataclasses
import json
from pathlib import Path

import pytest
import torch

from llama32.checkpoint import save
from llama32.llm import LLM
from llama32.loading import assemble, eos_ids, has_chat_template, load
from llama32.settings import Sampling
from llama32.tokenizer import Tokenizer
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
    """One to change."""
    return alphabet_checkpoint(tmp_path, max_position_embeddings=64)


def special(llm: LLM, text: str) -> int:
    assert llm.tokenizer
    return llm.tokenizer.special[text]


def without_tokenizer(llm: LLM) -> LLM:
    return dataclasses.replace(llm, tokenizer=None, chat_format=None)


def test_a_result_tells_text_ids_why_it_ended_and_how_many_tokens_it_took(llm):
    result = llm.generate("a", max_new_tokens=3)
    assert (result.text, result.ids, result.finish_reason) == ("bcd", [*b"bcd"], "length")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2, 3)  # with a bos
    assert result.logprobs is None
    assert result.message is None


def test_token_ids_go_in_as_they_are(llm):
    result = llm.generate([*b"xa"], max_new_tokens=2)
    assert result.text == "bc"
    assert result.usage.prompt_tokens == 2


def test_a_list_of_prompts_gives_a_list_of_results(llm):
    results = llm.generate(["a", [*b"p"], "x"], max_new_tokens=2)
    assert [result.text for result in results] == ["bc", "qr", "yz"]


def test_a_tokenizer_without_bos_gets_none(own_folder):
    edit_json(own_folder / "tokenizer.json", post_processor=None)
    assert load(own_folder).generate("a", max_new_tokens=1).usage.prompt_tokens == 1


def test_an_eos_ends_the_text_and_is_not_part_of_it(llm):
    result = llm.generate("X", max_new_tokens=9)
    assert (result.text, result.finish_reason) == ("YZ", "stop")
    assert result.ids == [*b"YZ", special(llm, "<|eot_id|>")]
    assert "YZ<|eot_id|>" in llm.generate("X", max_new_tokens=9, ignore_eos=True).text


def test_the_end_of_the_context_ends_the_text(own_folder):
    result = load(own_folder).generate("a", max_new_tokens=1000)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens + result.usage.completion_tokens == 64


def test_pieces_make_up_the_text_and_never_end_inside_a_character(tmp_path):
    llm = load(alphabet_checkpoint(tmp_path, says="aé→z"))
    stream = llm.stream("\n")
    assert list(stream) == ["a", "é", "→", "z"]
    assert stream.result.text == "aé→z"
    cut = llm.stream("\n", max_new_tokens=4)
    assert list(cut) == ["a", "é", "\ufffd"]


def test_a_stop_string_across_token_borders_ends_the_text(llm):
    stream = llm.stream("a", stop="fgh")
    assert list(stream) == ["b", "c", "d", "e"]
    assert stream.result.text == "bcde"
    assert stream.result.ids == [*b"bcdefgh"]
    assert stream.result.finish_reason == "stop"


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end(llm):
    stream = llm.stream("a", stop=["efx", "zz"], max_new_tokens=5)
    assert list(stream) == ["b", "c", "d", "ef"]
    assert stream.result.finish_reason == "length"


def test_logprobs_come_one_for_each_id(llm):
    result = llm.generate("a", max_new_tokens=3, logprobs=2)
    assert [next(iter(one.top)) for one in result.logprobs] == result.ids
    assert {len(one.top) for one in result.logprobs} == {2}


def test_a_listener_who_leaves_finds_what_there_is(llm):
    stream = llm.stream("a")
    for piece in stream:
        if piece == "d":
            break
    assert (stream.result.text, stream.result.finish_reason) == ("bcd", "abort")
    assert list(stream) == []
    assert stream.result == stream.run()


def test_a_stream_that_was_never_heard_has_an_empty_result(llm):
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


def test_a_result_stays_when_the_stream_is_gone_through_again(llm):
    stream = llm.stream("a", max_new_tokens=2)
    assert list(stream) == ["b", "c"]
    assert list(stream) == []
    assert stream.run().text == "bc"


def test_the_prompt_s_way_in_is_reported(llm):
    seen = []
    llm.stream("a" * 600, max_new_tokens=1, on_prefill=lambda *report: seen.append(report)).run()
    assert seen == [(512, 601), (601, 601)]


def test_a_chat_answers_with_a_message_that_continues_it(llm):
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
    asked = llm.chat(HELLO, tools=tools, date="26 Jul 2024", max_new_tokens=1)
    ids = llm.chat_format.encode(HELLO, tools=tools, date="26 Jul 2024")
    assert asked.usage.prompt_tokens == len(ids)
    assert len(ids) > len(llm.chat_format.encode(HELLO, date="26 Jul 2024"))


def test_a_tool_call_is_in_the_message(tmp_path):
    result = load(alphabet_checkpoint(tmp_path, says="[f(x=1)]")).chat(HELLO)
    assert result.text == "[f(x=1)]"
    [call] = result.message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}


def test_the_turn_ends_a_chat_even_where_the_checkpoint_names_no_eos(llm):
    nameless = dataclasses.replace(llm, eos_ids=())
    assert nameless.chat(HELLO).text == ALPHABET
    assert nameless.generate("X", max_new_tokens=9).finish_reason == "length"


def test_without_a_tokenizer_ids_come_for_ids(llm):
    bare = without_tokenizer(llm)
    result = bare.generate([*b"a"], max_new_tokens=3)
    assert (result.ids, result.text, result.finish_reason) == ([*b"bcd"], "", "length")
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        bare.generate("a")
    with pytest.raises(ValueError, match="stop: this checkpoint has no tokenizer"):
        bare.generate([1], stop="x")


def test_without_a_chat_format_chat_says_so(llm):
    with pytest.raises(ValueError, match="this checkpoint has no chat format"):
        without_tokenizer(llm).chat(HELLO)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(llm, prompt):
    with pytest.raises(ValueError, match="prompt: it is empty"):
        llm.generate(prompt)


def test_an_impossible_prompt_is_refused_before_anything_is_iterated(llm):
    with pytest.raises(ValueError, match="no room for an answer"):
        llm.stream("a" * 3000)


def test_settings_are_the_checkpoint_s_unless_changed_by_name_or_replaced(own_folder):
    said = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "eos_token_id": [7, 8]}
    (own_folder / "generation_config.json").write_text(json.dumps(said))
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


def test_loading_takes_a_dtype_and_reports_its_progress(folder):
    seen = []
    llm = load(folder, dtype=torch.bfloat16, on_progress=lambda *report: seen.append(report))
    assert llm.model.norm.weight.dtype == torch.bfloat16
    assert llm.generate("a", max_new_tokens=3).text == "bcd"
    assert seen[-1][0] == seen[-1][1] == sum(w.nbytes for w in load(folder).model.parameters())


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


def test_the_style_of_chat_can_be_chosen(own_folder):
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
    nameless = dataclasses.replace(llm.config, eos_token_ids=())
    assert eos_ids({"eos_token_id": 7}, llm.config, llm.tokenizer) == (7,)
    assert eos_ids({"eos_token_id": [7, 8]}, llm.config, llm.tokenizer) == (7, 8)
    assert eos_ids({"eos_token_id": None}, llm.config, llm.tokenizer) == llm.config.eos_token_ids
    ends = [special(llm, end) for end in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    assert eos_ids({}, nameless, llm.tokenizer) == (*ends,)
    assert eos_ids({}, nameless, None) == ()
