"""OpenAI's Python client against a running server, feature by feature."""

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.llm.loading import load
from llama32.sampling import derive_seed
from llama32.sampling_params import Sampling
from tests.alphabet import alphabet_checkpoint
from tests.serving import Served, serving

ASK: Any = [{"role": "user", "content": "Tell me a story about a dog and a ball."}]
DATE = {
    "chat_template_kwargs": {"date_string": "26 Jul 2024"}
}  # otherwise the prompt changes every day
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
        },
    },
}
PLACE: Any = {"type": "function", "function": {"name": "place"}}
TIME: Any = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load("tiny", engine=EngineSettings(cache_tokens=32_768))


@pytest.fixture(scope="module")
def served(llm) -> Iterator[Served]:
    with serving(llm) as server:
        yield server
        server.assert_idle()


@pytest.fixture(scope="module")
def client(served) -> Iterator[OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory) -> Iterator[OpenAI]:
    """A client of a model that continues the alphabet."""
    llm = load(alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=1024))
    with serving(llm, "abc") as server, server.client() as client:
        yield client
        server.assert_idle()


def ask(client: OpenAI, **changes: Any) -> Any:
    """Ask `tiny` for a short answer."""
    extra = DATE | changes.pop("extra_body", {})
    body = {"model": "tiny", "messages": ASK, "max_tokens": 24, "seed": 7, **changes}
    return client.chat.completions.create(**body, extra_body=extra)


def forced(text: str) -> dict[str, Any]:
    """Return parameters that force the answer."""
    return {"structured_outputs": {"choice": [text]}}


def expected(llm: LLM, **settings: Any) -> str:
    """Return the answer of the same model without a server."""
    settings = {"max_new_tokens": 24, "seed": 7, **settings}
    return llm.chat(ASK, date="26 Jul 2024", **settings).text


# Models


def test_the_model_is_listed_and_can_be_retrieved(client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "llama32")
    assert client.models.retrieve("tiny") == model


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4o")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.models.retrieve("gpt-4o")


def test_a_model_can_have_several_names(llm):
    names = ["meta-llama/Llama-3.2-3B-Instruct", "llama3.2"]
    own = replace(llm)  # with another engine, because a server closes the engine
    with serving(own, served_model_name=names) as server, server.client() as client:
        assert [model.id for model in client.models.list()] == names
        assert client.models.retrieve(names[0]).id == names[0]
        answers = [ask(client, model=name) for name in names]
        assert [answer.model for answer in answers] == names
        assert answers[0].choices[0].message == answers[1].choices[0].message
        with pytest.raises(openai.NotFoundError):
            ask(client, model="tiny")


# Chat


def test_a_chat_has_the_answer_of_the_model_without_a_server(client, llm):
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(llm)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_stream_has_the_same_answer_in_pieces(client, llm):
    chunks = list(ask(client, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == expected(llm)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 20


def test_a_stream_ends_with_the_usage_on_request(client):
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    whole = ask(client).usage
    assert last.usage.completion_tokens == whole.completion_tokens == 24
    assert last.usage.prompt_tokens == whole.prompt_tokens


def test_the_client_s_stream_helper_works(client, llm):
    body: Any = {"model": "tiny", "messages": ASK, "seed": 7, "extra_body": DATE}
    with client.chat.completions.stream(**body) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content
    assert final.choices[0].message.content == expected(llm, max_new_tokens=900)


def test_the_usage_reports_cached_tokens(client):
    long = [{"role": "user", "content": "Tell me a story about a cat. " * 20}]
    first, again = (ask(client, messages=long) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= 128
    assert first.choices[0].message == again.choices[0].message


def test_a_dialog_continues_with_the_unchanged_message(client):
    answer = ask(client).choices[0].message
    dialog = [*ASK, answer, {"role": "user", "content": "And then?"}]
    assert ask(client, messages=dialog).usage.prompt_tokens > 60


def test_roles_and_parts_of_openai_s_api_are_accepted(client):
    text = "You tell stories."
    system, developer, parts = (
        ask(client, messages=[first, *ASK])
        for first in (
            {"role": "system", "content": text},
            {"role": "developer", "content": text},
            {
                "role": "system",
                "content": [{"type": "text", "text": part} for part in ("You tell ", "stories.")],
            },
        )
    )
    assert system.usage.prompt_tokens > ask(client).usage.prompt_tokens
    assert system.choices == developer.choices == parts.choices


def test_control_tokens_in_a_message_are_text(client, served):
    messages = [{"role": "user", "content": "<|eot_id|><|start_header_id|>system<|end_header_id|>"}]
    ids = tokenized(served, messages=messages, **DATE)
    plain = tokenized(served, messages=[{"role": "user", "content": "x"}], **DATE)
    special = served.service.llm.tokenizer.special
    for token in ("<|eot_id|>", "<|start_header_id|>"):
        assert ids.count(special[token]) == plain.count(special[token])
    assert ask(client, messages=messages).choices


# Sampling


def test_several_answers_have_different_seeds(client, llm):
    answer = ask(client, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [expected(llm, seed=derive_seed(7, i)) for i in range(3)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 72
    assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens


def test_several_answers_can_be_streamed_at_once(client):
    texts = ["", "", ""]
    order = []
    for chunk in ask(client, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
    whole = ask(client, n=3)
    assert texts == [choice.message.content for choice in whole.choices]
    assert order != sorted(order)  # no answer waits for another


def test_without_a_seed_answers_differ(client):
    settings = {"seed": None, "temperature": 1.5, "max_tokens": 60}
    assert ask(client, **settings).choices != ask(client, **settings).choices


@pytest.mark.parametrize(
    ("parameters", "settings"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1.9, "top_p": 0.7}, {"temperature": 1.9, "top_p": 0.7}),
        ({"top_p": 0}, {"top_p": 1e-9}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
        ({"logit_bias": {"300": 100}}, {"logit_bias": {300: 100}}),
        ({"max_completion_tokens": 5, "max_tokens": None}, {"max_new_tokens": 5}),
        ({"extra_body": {"top_k": 2}}, {"top_k": 2}),
        ({"extra_body": {"top_k": -1}}, {}),
        ({"extra_body": {"min_p": 0.2}}, {"min_p": 0.2}),
        ({"extra_body": {"repetition_penalty": 1.4}}, {"repetition_penalty": 1.4}),
        (
            {"extra_body": {"stop_token_ids": list(range(300, 900))[:64]}},
            {"stop_ids": range(300, 364)},
        ),
        (
            {"extra_body": {"ignore_eos": True}, "max_tokens": 200},
            {"ignore_eos": True, "max_new_tokens": 200},
        ),
    ],
    ids=",".join,
)
def test_settings_reach_the_sampler(client, llm, parameters, settings):
    assert ask(client, **parameters).choices[0].message.content == expected(llm, **settings)


def test_the_default_temperature_is_the_checkpoint_s(client, llm):
    changes: Any = {}, {"temperature": 0}
    answers = [ask(client, seed=1, max_tokens=60, **change) for change in changes]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts == [expected(llm, seed=1, max_new_tokens=60, temperature=t) for t in (0.6, 0)]
    assert texts[0] != texts[1]


def test_a_stop_string_ends_the_text_and_is_not_in_it(alphabet):
    body: Any = {"model": "abc", "messages": [{"role": "user", "content": "x"}]}
    whole = alphabet.chat.completions.create(**body)
    assert whole.choices[0].message.content == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert whole.choices[0].finish_reason == "stop"
    for stop, text in (("DEF", "ABC"), (["XY", "GH", "F!"], "ABCDEF"), ("!", "ABCDEFGHIJKLMNO")):
        cut = alphabet.chat.completions.create(**body, stop=stop, max_tokens=15)
        assert cut.choices[0].message.content == text
        pieces = alphabet.chat.completions.create(**body, stop=stop, max_tokens=15, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == text


# Logprobs


def test_logprobs_come_for_each_token_of_the_text(client, llm):
    answer = ask(client, logprobs=True, top_logprobs=3)
    result = llm.chat(ASK, date="26 Jul 2024", max_new_tokens=24, seed=7, logprobs=3)
    tokens = answer.choices[0].logprobs.content
    chosen = [logprobs.chosen for logprobs in result.logprobs]
    assert [token.logprob for token in tokens] == chosen
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert text == answer.choices[0].message.content
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-6


def test_logprobs_can_be_of_the_chosen_tokens_alone(client):
    tokens = ask(client, logprobs=True).choices[0].logprobs.content
    assert len(tokens) == 24
    assert all(token.top_logprobs == [] for token in tokens)


def test_a_stream_has_the_same_logprobs_in_pieces(client):
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed, text = [], ""
    for chunk in ask(client, logprobs=True, top_logprobs=2, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        streamed += choice.logprobs.content if choice.logprobs else []
    assert streamed == whole
    assert b"".join(bytes(token.bytes) for token in streamed).decode() == text


def test_the_end_of_the_text_has_no_logprobs(alphabet):
    body: Any = {"model": "abc", "messages": [{"role": "user", "content": "x"}], "logprobs": True}
    for stop, text in ((None, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), ("DEF", "ABC")):
        answer = alphabet.chat.completions.create(**body, stop=stop)
        assert "".join(token.token for token in answer.choices[0].logprobs.content) == text
        chunks = alphabet.chat.completions.create(**body, stop=stop, stream=True)
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.logprobs]
        tokens = [token.token for choice in choices for token in choice.logprobs.content]
        assert "".join(tokens) == text


# Tools


def calls_of(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls of an answer without text."""
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = choice.message.tool_calls
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


SPELLINGS = {
    '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}': 1,
    '[weather(city="Rome", days=2)]': 1,
    '[weather(city="Rome", days=2), time()]': 2,
    '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}; '
    '{"name": "time", "parameters": {}}': 2,
}
EXPECTED = [("weather", {"city": "Rome", "days": 2}), ("time", {})]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_call_in_the_text_becomes_a_tool_call(client, spelling):
    body = {"tools": [WEATHER, TIME], "max_tokens": 100, "extra_body": forced(spelling)}
    assert calls_of(ask(client, **body)) == EXPECTED[: SPELLINGS[spelling]]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_streamed_call_is_one_chunk_and_never_text(client, spelling):
    body = {"tools": [WEATHER, TIME], "max_tokens": 100, "extra_body": forced(spelling)}
    chunks = list(ask(client, **body, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert not "".join(delta.content or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.index for call in calls] == list(range(len(calls)))
    pairs = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    assert pairs == EXPECTED[: SPELLINGS[spelling]]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_broken_call_is_text(client):
    broken = '{"name": "weather", "parameters": {"city": Rome}}'
    body = {"tools": [WEATHER], "max_tokens": 100, "extra_body": forced(broken)}
    (choice,) = ask(client, **body).choices
    assert (choice.message.content, choice.message.tool_calls) == (broken, None)
    assert choice.finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, **body, stream=True)]
    assert "".join(pieces) == broken


def test_a_call_without_tools_is_text(client):
    text = next(iter(SPELLINGS))
    body = {"max_tokens": 100, "extra_body": forced(text)}
    assert ask(client, **body).choices[0].message.content == text
    silent = ask(client, **body, tools=[WEATHER], tool_choice="none")
    assert silent.choices[0].message.content == text
    assert silent.usage.prompt_tokens == ask(client).usage.prompt_tokens  # the prompt has no tools
    chunks = list(ask(client, **body, stream=True))
    assert len(chunks) > 10  # the server held nothing back


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_demanded(client, temperature, stream):
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, names in (("required", {"weather", "time"}), (named, {"weather"})):
        for seed in range(4):
            body = {"tools": [TIME, WEATHER], "tool_choice": choice, "max_tokens": 300}
            answer = ask(client, **body, temperature=temperature, seed=seed, stream=stream)
            if stream:
                deltas = [chunk.choices[0].delta for chunk in answer]
                (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
                calls = [(call.function.name, json.loads(call.function.arguments))]
            else:
                calls = calls_of(answer)
            ((name, arguments),) = calls
            assert name in names
            if name == "weather":
                schema = WEATHER["function"]["parameters"]
                jsonschema_rs.validate(schema, arguments)


def test_parallel_calls_can_be_declined(client):
    two = '[weather(city="Rome", days=2), time()]'
    body = {"tools": [WEATHER, TIME], "max_tokens": 100, "extra_body": forced(two)}
    answer = ask(client, **body, parallel_tool_calls=False)
    assert calls_of(answer) == EXPECTED[:1]


def test_tool_answers_are_sent_in_openai_s_form(client, served):
    body = {"tools": [TIME, PLACE], "max_tokens": 60}
    calls = ask(client, **body, extra_body=forced("[time(), place()]")).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"answer to {call.function.name}"}
        for call in calls.tool_calls
    ]
    dialog = [*ASK, calls, *results[::-1]]
    assert ask(client, messages=dialog, **body).choices
    plain = [message if isinstance(message, dict) else message.model_dump() for message in dialog]
    ids = tokenized(served, messages=plain, tools=[TIME, PLACE], **DATE)
    text = served.service.llm.tokenizer.decode(ids)
    parts = '{"name": "time"', "answer to time", '{"name": "place"', "answer to place"
    assert [text.count(part) for part in parts] == [1] * 4
    assert sorted(parts, key=text.rindex) == [*parts]


# Structured outputs


class Story(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hero: str = Field(max_length=10)
    age: int = Field(ge=0, le=99)
    mood: Literal["glad", "sad"]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_the_schema(client, temperature):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny",
            messages=ASK,
            response_format=Story,
            temperature=temperature,
            seed=seed,
            max_tokens=200,
        )
        assert isinstance(answer.choices[0].message.parsed, Story)


def test_an_answer_can_be_any_json_object(client):
    body = {"response_format": {"type": "json_object"}, "temperature": 0, "max_tokens": 300}
    answer = ask(client, **body).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")


def test_a_structured_answer_may_be_cut(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny", messages=ASK, response_format=Story, max_tokens=5
        )


def test_with_tools_the_answer_follows_the_schema_or_is_a_call(client):
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    seen = set()
    for seed in range(12):
        answer = ask(
            client, response_format=form, tools=[TIME], max_tokens=60, seed=seed, temperature=2
        )
        (choice,) = answer.choices
        seen.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content) == {"a": 1}
        elif choice.finish_reason == "tool_calls":
            assert choice.message.tool_calls[0].function.name == "time"
    assert "stop" in seen or "tool_calls" in seen


@pytest.mark.parametrize(
    ("form", "holds"),
    [
        ({"regex": r"\d{4}-\d\d"}, lambda text: text[:4].isdigit() and text[4] == "-"),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"json": {"enum": [1, 2]}}, lambda text: json.loads(text) in (1, 2)),
    ],
    ids=lambda form: ",".join(form) if isinstance(form, dict) else "",
)
def test_structured_outputs_work_as_in_vllm(client, form, holds):
    extra = {"structured_outputs": form}
    assert holds(ask(client, extra_body=extra, temperature=2).choices[0].message.content)
    text = client.completions.create(model="tiny", prompt="The", seed=1, extra_body=extra)
    assert holds(text.choices[0].text)


# Completions


def test_a_completion_has_the_text_of_the_model_without_a_server(client, llm):
    answer = client.completions.create(model="tiny", prompt="Once upon", seed=7, max_tokens=20)
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert choice.text == llm.generate("Once upon", seed=7, max_new_tokens=20).text
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 20


def test_sixteen_tokens_are_the_default_of_a_completion(client):
    answer = client.completions.create(model="tiny", prompt="Once upon", seed=7)
    assert answer.usage.completion_tokens == 16


def test_a_chat_without_a_limit_runs_to_the_end(client):
    answer = client.chat.completions.create(model="tiny", messages=ASK, seed=7)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 50


def test_prompts_can_be_token_ids_and_several(client, llm):
    ids = llm.encode("Once upon")
    texts = ["Once upon", "One day, a dog"]
    body: Any = {"model": "tiny", "seed": 7, "max_tokens": 12}
    by_text = client.completions.create(prompt=texts, n=2, **body)
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=text, n=2, **body) for text in texts]
    expected = [choice.text for answer in alone for choice in answer.choices]
    assert [choice.text for choice in by_text.choices] == expected
    by_id = client.completions.create(prompt=ids, **body)
    assert by_id.choices[0].text == expected[0]
    both = client.completions.create(prompt=[ids, llm.encode(texts[1])], **body)
    assert [choice.text for choice in both.choices] == [expected[0], expected[2]]
    prompts = sum(len(llm.encode(text)) for text in texts)
    assert by_text.usage.prompt_tokens == both.usage.prompt_tokens == prompts


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_can_be_echoed(client, llm, stream):
    for prompt in ("Once upon", llm.tokenizer.encode("Once upon")):
        body: Any = {"model": "tiny", "prompt": prompt, "seed": 7, "max_tokens": 5}
        new = client.completions.create(**body).choices[0].text
        answer = client.completions.create(**body, echo=True, stream=stream)
        chunks = answer if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Once upon" + new


def test_a_completion_streams(client):
    body: Any = {"model": "tiny", "prompt": "Once upon", "seed": 7, "max_tokens": 12}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 10


def test_a_completion_has_logprobs_in_the_older_shape(client, llm):
    body: Any = {"model": "tiny", "prompt": "Once upon", "seed": 7, "max_tokens": 5}
    (choice,) = client.completions.create(**body, logprobs=2).choices
    result = llm.generate("Once upon", seed=7, max_new_tokens=5, logprobs=2)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs == [logprobs.chosen for logprobs in result.logprobs]
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 5
    offsets = [choice.text.index(choice.logprobs.tokens[0])]
    for token in choice.logprobs.tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    assert choice.logprobs.text_offset == offsets


# Errors


@pytest.mark.parametrize(
    ("changes", "param", "match"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "cat", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user"}]}, None, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type", "'text'"),
        ({"tool_choice": "required"}, None, "tool_choice needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}},
         None, "there is no tool 'no'"),
        ({"top_logprobs": 3}, None, "needs logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999": 1}}, None, "token id 99999"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs it"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":
          {"type": "cat"}}}}, None, "grammar"),
        ({"extra_body": {"best_of": 2}}, "best_of", "Unrecognized request argument supplied"),
        ({"extra_body": {"functions": []}}, "functions", "Unrecognized request argument"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, None, "may come to 1024"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_by_name(client, changes, param, match):
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        ask(client, **changes)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param


def test_a_prompt_that_is_too_long_has_openai_s_code(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_parameters_without_effect_are_accepted(client):
    ignored = {"user": "someone", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert ask(client, **ignored).choices == ask(client).choices


# Tokens


def tokenized(served: Served, **body: Any) -> list[int]:
    """Return the token ids from the server."""
    with served.client() as client:
        url = f"{served.url}/tokenize"
        answer = client.post(url, body=body, cast_to=dict[str, Any])
    assert answer["count"] == len(answer["tokens"])
    return answer["tokens"]


def test_texts_and_dialogs_are_tokenized_and_detokenized(client, served, llm):
    assert tokenized(served, prompt="Once upon") == llm.encode("Once upon")
    plain = tokenized(served, prompt="Once upon", add_special_tokens=False)
    assert plain == llm.tokenizer.encode("Once upon")
    dialog = tokenized(served, messages=ASK, model="tiny", **DATE)
    assert dialog == llm.chat_format.encode(ASK, date="26 Jul 2024")
    assert ask(client).usage.prompt_tokens == len(dialog)
    closed = tokenized(served, messages=ASK, add_generation_prompt=False, **DATE)
    assert dialog[: len(closed)] == closed
    url = f"{served.url}/detokenize"
    back = client.post(url, body={"tokens": plain}, cast_to=dict[str, Any])
    assert back == {"prompt": "Once upon"}


# Many at once


def test_two_hundred_concurrent_requests_get_their_own_answers(llm):
    """Each answer equals the answer alone, because the engine is batch-invariant."""
    assert llm.engine.deterministic
    subjects = "a cat", "a dog", "a tree", "the sea"
    prompts = [(f"Tell me about {subjects[i % 4]} number {i}.", 20 + i % 30, i) for i in range(200)]

    async def ask_one(client: AsyncOpenAI, text: str, max_tokens: int, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": text}],
            max_tokens=max_tokens,
            seed=seed,
            stream=True,
            extra_body=DATE,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all(url: str) -> list[str]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask_one(client, *prompt) for prompt in prompts))

    with serving(replace(llm)) as server:
        answers = asyncio.run(ask_all(f"{server.url}/v1"))
        server.assert_idle()
        assert server.engine.stats.running == 0
    for (text, max_tokens, seed), answer in list(zip(prompts, answers, strict=True))[::9]:
        sampling = Sampling(temperature=0.6, top_p=0.9, seed=seed, max_new_tokens=max_tokens)
        message = [{"role": "user", "content": text}]
        assert answer == llm.chat(message, sampling, date="26 Jul 2024").text
    assert len({*answers}) > 150
