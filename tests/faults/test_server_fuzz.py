"""Request bodies, generated and by hand: the server answers, or refuses in OpenAI's shape.

A refusal costs little time and memory. After each test, the server is idle and gives a good request
the same answer as before.
"""

import json
import re
import socket
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.openapi import from_dict

from llama32.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from llama32.text.chat import Chat
from tests.rawhttp import Wire, ask
from tests.serving import COMPLETE, Served, assert_unharmed, serving

BODIES: dict[str, Any] = {
    "/v1/chat/completions": ChatBody,
    COMPLETE: CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
CHAT, _, TOKENIZE, DETOKENIZE = BODIES
USER: Any = {"role": "user", "content": "Tell me about a cat."}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [USER], "max_tokens": 1, "max_completion_tokens": 1},
    COMPLETE: {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 1},
    TOKENIZE: {"prompt": "Once"},
    DETOKENIZE: {"tokens": [5]},
}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MB = 2**20


@pytest.fixture(autouse=True)
def unharmed(served, hello) -> Iterator[None]:
    yield
    assert_unharmed(served, hello)


def refusal(served: Served, path: str, changes: Any) -> dict[str, Any]:
    """Return the error for a good request with these changes."""
    answer = ask(served.port, path, GOOD[path] | changes)
    assert answer.status == 400, answer.body[:300]
    return answer.error


# Generated

EXAMPLES = {
    (CHAT, GenerationMode.POSITIVE): 160,
    (CHAT, GenerationMode.NEGATIVE): 120,
    (COMPLETE, GenerationMode.POSITIVE): 240,
    (COMPLETE, GenerationMode.NEGATIVE): 180,
    (TOKENIZE, GenerationMode.POSITIVE): 80,
    (TOKENIZE, GenerationMode.NEGATIVE): 60,
    (DETOKENIZE, GenerationMode.POSITIVE): 90,
    (DETOKENIZE, GenerationMode.NEGATIVE): 90,
}
assert sum(EXAMPLES.values()) >= 1000
INTEGERS = "max_tokens max_completion_tokens n top_k top_logprobs logprobs seed".split()


def repaired(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a valid and short request: repair what the schema cannot express."""
    body = body | {"model": "tiny"}
    if path in (CHAT, COMPLETE):
        for name in INTEGERS:  # 3.0 is an integer in JSON schema
            if isinstance(body.get(name), float):
                body[name] = int(body[name])
        body |= {"max_tokens": min(body.get("max_tokens") or 3, 3), "n": min(body.get("n") or 1, 2)}
        body["logit_bias"] = {f"{i}": 1.5 for i, _ in enumerate(body.get("logit_bias") or ())}
        body["stop_token_ids"] = [int(id) % 2000 for id in body.get("stop_token_ids") or ()]
    if "messages" in body:
        body["messages"] = [
            {"role": message["role"], "content": message.get("content") or "Hi"}
            for message in (body["messages"] or [USER])[:3]
        ]
    if path == CHAT:
        body |= {"max_completion_tokens": 3, "tool_choice": "auto"}
        body["logprobs"] = body.get("top_logprobs") is not None
    if path == COMPLETE:
        body["prompt"] = repaired_prompt(body["prompt"])
    if path == TOKENIZE and (body.get("prompt") is None) == (body.get("messages") is None):
        body |= {"prompt": "Hi", "messages": None}
    if path == DETOKENIZE:
        body["tokens"] = [int(id) for id in body["tokens"]]
    return body


def repaired_prompt(prompt: Any) -> Any:
    """Return a prompt with non-empty texts and existing token ids."""
    if isinstance(prompt, list):
        return [repaired_prompt(part) for part in prompt[:3]]
    return int(prompt) % 2000 if isinstance(prompt, int | float) else prompt or "Hi"


@pytest.mark.filterwarnings("ignore:Do not use the `random` module:Warning")  # schemathesis does
@pytest.mark.parametrize(("path", "mode"), EXAMPLES)
def test_generated_bodies_are_answered_or_refused(served, path, mode):
    bodies = generated(served, path, mode)
    assert len(bodies) >= EXAMPLES[path, mode]
    if mode == GenerationMode.POSITIVE:
        bodies[::2] = map(partial(repaired, path), bodies[::2])
    with ThreadPoolExecutor(8) as pool:
        statuses = [*pool.map(partial(answered, served.port, path), bodies)]
    if mode == GenerationMode.POSITIVE:
        assert statuses.count(200) > len(statuses) / 3  # not only refusals


def generated(served: Served, path: str, mode: GenerationMode) -> list[Any]:
    """Generate bodies from the server's OpenAPI document: bytes, or values to send as JSON."""
    operation = from_dict(served.server.config.app.openapi())[path]["POST"]
    bodies: list[Any] = []

    @settings(
        max_examples=EXAMPLES[path, mode],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        arguments = case.as_transport_kwargs()
        bodies.append(arguments.get("json", arguments.get("data", b"")))

    collect()
    return bodies


def answered(port: int, path: str, body: Any) -> int:
    """Send a body; return the status after checking the shape of the response."""
    answer = ask(port, path, body)
    assert answer.status in (200, 400, 404), (body, answer.body)
    if answer.status != 200:
        assert answer.error["type"] == "invalid_request_error"
    elif answer.headers["content-type"] != "application/json":
        assert answer.events[-1] == "[DONE]"
    return answer.status


@contextmanager
def limited_cost(seconds: float = 10) -> Iterator[None]:
    """Check that the block allocates at most 48 MB in Python and ends in time."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 48 * MB
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < seconds


# By hand


@pytest.mark.parametrize("path", BODIES)
def test_a_value_of_the_wrong_type_is_refused_by_parameter_name(served, path):
    with Wire(served.port) as wire:
        for name, field in BODIES[path].model_fields.items():
            wire.post(path, GOOD[path] | {name: [[{}]]})
            assert (wire.answer().error["param"] or "").startswith(field.alias or name)


ODD = [None, True, -1, 0.5, 10**400, "", "\0", "x" * 10**5, [], [[]], {}]


@pytest.mark.parametrize("path", BODIES)
def test_odd_values_of_any_parameter_are_accepted_or_refused(served, path):
    bodies = [GOOD[path] | {name: odd} for name in BODIES[path].model_fields for odd in ODD]
    with ThreadPoolExecutor(8) as pool:
        statuses = [*pool.map(partial(answered, served.port, path), bodies)]
    assert statuses.count(400) > len(bodies) / 3


def chat_of(fields: bytes) -> bytes:
    """Return a chat body with these raw fields in the message."""
    return b'{"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", %s}]}' % fields


INVALID_JSON = {
    "empty": b"",
    "spaces": b"  ",
    "null": b"null",
    "list": b"[]",
    "text": b'"text"',
    "cut": b'{"model": "tiny"',
    "two": b"{}{}",
    "nan": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
    "1e400": b'{"model": "tiny", "prompt": "a", "temperature": 1e400}',
    "5000-digits": b'{"model": "tiny", "prompt": "a", "seed": 1%s}' % (b"0" * 5000),
    "5000-digits-for-a-float": b'{"model": "tiny", "prompt": "a", "top_p": 1%s}' % (b"0" * 5000),
    "deep-list": b"[" * 100_000,
    "deep-dict": b'{"a": ' * 100_000,
    "deep-and-closed": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "line-break": chat_of(b'"content": "a\nb"'),
    "utf-8-cut": chat_of(b'"content": "\xe2\x82"'),
    "utf-8-overlong": chat_of(b'"content": "\xc0\xaf"'),
    "utf-16": json.dumps(GOOD[CHAT]).encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "surrogate-raw": chat_of(b'"content": "\xed\xa0\x80"'),
    "surrogate-in-a-message": chat_of(b'"content": "\\ud800"'),
    "surrogate-in-a-key": chat_of(b'"content": "a", "\\udfff": 1'),
    "surrogate-in-stop": b'{"model": "tiny", "prompt": "a", "stop": ["\\udc00"]}',
    "surrogate-in-tools": b'{"prompt": "a", "tools": [{"description": "\\ud83d"}]}',
    "surrogate-in-a-prompt": b'{"model": "tiny", "prompt": "\\ud83d"}',
    "surrogates-reversed": b'{"model": "tiny", "prompt": "\\ude00\\ud83d"}',
}


@pytest.mark.parametrize("path", BODIES)
def test_invalid_json_and_utf_8_are_refused(served, path):
    with Wire(served.port) as wire:  # on the same connection: no refusal closes it
        for name, body in INVALID_JSON.items():
            wire.post(path, body)
            answer = wire.answer()
            assert (answer.status, name) == (400, name)
            assert answer.error["type"] == "invalid_request_error"


def test_the_last_of_two_equal_keys_counts(served):
    body = json.dumps(GOOD[CHAT]).encode()
    assert ask(served.port, CHAT, b'{"model": 1, "max_tokens": {}, %s' % body[1:]).status == 200
    assert ask(served.port, CHAT, body[:-1] + b', "model": 1}').error["param"] == "model"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        (None, 400),
        ("", 400),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=x", 400),
        ("\xff;;=", 400),
    ],
)
def test_a_body_needs_the_content_type_of_json(served, kind, status):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = ask(served.port, CHAT, GOOD[CHAT], headers)
    assert answer.status == status
    assert status == 200 or "Content-Type: application/json" in answer.error["message"]


def schema(schema: Any) -> dict[str, Any]:
    """Return parameters that demand answers of a schema."""
    named = {"name": "x", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def grammar(**outputs: Any) -> dict[str, Any]:
    return {"structured_outputs": outputs}


def called(arguments: str, role: str = "assistant") -> dict[str, Any]:
    """Return a dialog with a tool call."""
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [USER, {"role": role, "content": "a", "tool_calls": [call]}]}


def tool(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def nested(levels: int, value: Any) -> Any:
    for _ in range(levels):
        value = [value]
    return value


REMOTE = {"$ref": "https://example.invalid/x.json"}
NAMED: Any = {"type": "function", "function": {"name": "x" * 10**6}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"best_of": 2}, "^Unrecognized request argument supplied: best_of$"),
    (CHAT, {"messages": [USER | {"weight": 1}]}, "Unrecognized .* supplied: weight$"),
    (CHAT, {"stream_options": {"fast": True}}, "Unrecognized .* supplied: fast$"),
    (COMPLETE, {"x" * 10**6: 1}, "Unrecognized .* supplied: x{64}$"),
    (COMPLETE, {"\0\n\u20ac": 1}, r"Unrecognized .* supplied: \\x00\\n\\u20ac$"),
    (TOKENIZE, {"text": "a"}, "Unrecognized .* supplied: text$"),
    (CHAT, {"logit_bias": {"99999": 1}}, "token id 99999"),
    (CHAT, {"logit_bias": {"a": 1}}, "token ids"),
    (CHAT, {"logit_bias": {"1.5": 1}}, "token ids"),
    (CHAT, {"logit_bias": {f"{i}": 1 for i in range(-1, 1000)}}, "logit_bias is"),
    (CHAT, {"logit_bias": {"9" * 5000: 1}}, "token ids"),
    (CHAT, {"logit_bias": {"5": 101}}, "less than or equal to 100"),
    (COMPLETE, {"prompt": [99999]}, "token id 99999"),
    (COMPLETE, {"prompt": [5, 2**70]}, "token id"),
    (COMPLETE, {"prompt": [[5], [-1]]}, "greater than or equal to 0"),
    (COMPLETE, {"prompt": [5, "a"]}, "prompt"),
    (COMPLETE, {"prompt": ""}, "empty"),
    (COMPLETE, {"prompt": ["a", ""]}, "empty"),
    (COMPLETE, {"n": 129}, "less than or equal to 128"),
    (COMPLETE, {"prompt": ["a"] * 256, "n": 128}, "asks for 32768 completions"),
    (CHAT, {"stop": ["a"] * 17}, "at most 16"),
    (CHAT, {"stop_token_ids": [2**70]} | grammar(choice=["a"]), "int"),
    (CHAT, {"stop_token_ids": [2**31]} | grammar(choice=["a"]), "out of range"),
    (CHAT, called("{}", "system"), "only the assistant"),
    (CHAT, called("[" * 10**5), "tool_calls"),
    (CHAT, called('{"x": NaN}'), "tool_calls"),
    (CHAT, {"tools": [TOOL], "tool_choice": NAMED}, "there is no tool 'xxx"),
    (CHAT, {"tools": [TOOL] * 129}, "at most 128"),
    (CHAT, {"tools": [TOOL, TOOL]}, "same name"),
    (CHAT, {"tools": [tool(**REMOTE)], "tool_choice": "required"}, "grammar"),
    (CHAT, schema(REMOTE), "does not fetch"),
    (CHAT, schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    (CHAT, schema({"$ref": "#/$defs/no"}), "does not exist"),
    (CHAT, schema({"type": "nonsense"}), "Invalid type"),
    (CHAT, schema({"type": "string", "pattern": "("}), "unclosed group"),
    (CHAT, schema({"type": "string", "maxLength": 10**18}), "grammar"),
    (CHAT, schema({"type": "integer", "minimum": 5, "maximum": 3}), "grammar"),
    (CHAT, schema({"properties": [1]}), "properties must be an object"),
    (CHAT, schema({"enum": nested(150, "a")}), "recursion limit"),
    (CHAT, schema({"enum": [f"{i}" for i in range(100_000)]}), "too big"),
    (CHAT, grammar(regex="(?=a)b"), "look-around"),
    (CHAT, grammar(regex="(" * 10**4), "grammar"),
    (CHAT, grammar(regex="(a{1000}){1000}"), "too many"),
    (CHAT, grammar(regex="a" * 10**6), "at most 65536 characters"),
    (CHAT, grammar(choice=[f"{i}" for i in range(10**5)]), "at most 4096"),
    (CHAT, grammar(regex="a", choice=["a"]), "one of"),
]


@pytest.mark.parametrize(
    ("path", "changes", "pattern"), REFUSED, ids=[pattern for *_, pattern in REFUSED]
)
def test_an_impossible_request_is_refused_with_the_reason(served, path, changes, pattern):
    began = time.monotonic()
    assert re.search(pattern, refusal(served, path, changes)["message"])
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (CHAT, {"messages": [USER | {"content": "cat " * 2000}]}),
        (COMPLETE, {"prompt": "cat " * 2000}),
        (COMPLETE, {"prompt": [5] * 1024}),
        (COMPLETE, {"prompt": [5] * 10**6}),
    ],
    ids=["dialog", "text", "ids", "many-ids"],
)
def test_a_prompt_beyond_the_context_has_openai_s_code(served, path, changes):
    error = refusal(served, path, changes)
    assert error["code"] == "context_length_exceeded"
    assert "may come to 1024" in error["message"]


@pytest.mark.parametrize("regex", ["(a+)+$", "(a|a)*b(a|a)*c", "(.*a.{20})x", r"\p{L}{1000}"])
def test_a_regex_that_stalls_backtracking_engines_is_fast(served, regex):
    body = GOOD[CHAT] | grammar(regex=regex) | {"max_completion_tokens": 8}
    assert ask(served.port, CHAT, body).status == 200


def test_a_remote_schema_is_not_fetched(served):
    with socket.create_server(("127.0.0.1", 0)) as remote:
        url = f"http://127.0.0.1:{remote.getsockname()[1]}/x.json"
        for reference in ({"$ref": url}, {"$id": url, "$ref": "y.json"}, {"$schema": url}):
            assert answered(served.port, CHAT, GOOD[CHAT] | schema(reference))
        remote.setblocking(False)
        with pytest.raises(BlockingIOError):
            remote.accept()


def test_typed_control_tokens_stay_text(served, llm):
    typed = "<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n<|begin_of_text|>\0"
    plain = ask(served.port, TOKENIZE, {"prompt": typed, "add_special_tokens": False}).json
    control = {*llm.tokenizer.special.values()}
    assert plain["tokens"] == llm.tokenizer.encode(typed)
    assert not control & {*plain["tokens"]}
    assert ask(served.port, DETOKENIZE, {"tokens": plain["tokens"]}).json == {"prompt": typed}
    control_ids = []
    for content in ("a", typed):
        messages = [USER | {"content": content, "role": role} for role in ("system", "user")]
        ids = ask(served.port, TOKENIZE, {"messages": messages}).json["tokens"]
        control_ids.append([id for id in ids if id in control])
    assert control_ids[0] == control_ids[1]


MANY = {f"n{i}": 1 for i in range(100_000)}
WRONG = [1] * 300_000
MISTAKES: dict[str, dict[str, Any]] = {
    "names": MANY,
    "names-inside": {"messages": [USER | MANY]},
    "messages": {"messages": WRONG},
    "parts": {"messages": [USER | {"content": WRONG}]},
    "calls": {"messages": [USER | {"tool_calls": WRONG}]},
    "choices": grammar(choice=WRONG),
    "modalities": {"modalities": WRONG},
    "metadata": {"metadata": MANY},
    "biases": {"logit_bias": MANY},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_many_mistakes_cost_no_more_than_one(served, name):
    body = json.dumps(GOOD[CHAT] | MISTAKES[name]).encode()
    with limited_cost():
        assert ask(served.port, CHAT, body).error


def test_no_prompt_is_far_longer_than_the_body(served):
    wide = json.dumps(GOOD[CHAT] | {"tools": [tool(enum=nested(180, [0] * 50_000))]}).encode()
    with limited_cost():
        assert "tools: the schemas" in ask(served.port, CHAT, wide).error["message"]
    user, calls = called("{}")["messages"]
    calls |= {"content": "a" * 20_000, "tool_calls": calls["tool_calls"] * 100}
    answer = {"role": "tool", "tool_call_id": "1", "content": "a" * 20_000}
    message = refusal(served, CHAT, {"messages": [user, calls, answer]})["message"]
    assert int(re.search(r"has (\d+) tokens", message)[1]) < 50_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_generated_call_may_have_a_lone_surrogate(served, stream):
    call = '{"name": "\\ud800", "parameters": {"x": "\\udfff"}}'
    body = GOOD[CHAT] | {"tools": [TOOL], "max_completion_tokens": 99, "stream": stream}
    answer = ask(served.port, CHAT, body | grammar(choice=[call]))
    assert answer.status == 200
    assert not stream or answer.events[-1] == "[DONE]"
    assert b"tool_calls" in answer.body


def test_a_feature_that_the_checkpoint_lacks_is_refused(llm):
    with serving(replace(llm, tokenizer=None, chat_format=None)) as server:
        for path in BODIES:
            refusal(server, path, {})
        ids = GOOD[COMPLETE] | {"prompt": [5, 6], "logprobs": 2}
        assert ask(server.port, COMPLETE, ids).status == 200
        server.assert_idle()
    with serving(replace(llm, chat_format=Chat(llm.tokenizer, "meta"))) as server:
        assert ask(server.port, CHAT, GOOD[CHAT]).status == 200
        for option in ({"tools_in_user_message": False}, {"date_string": "26 Jul 2024"}):
            refusal(server, CHAT, {"chat_template_kwargs": option})
        refusal(server, CHAT, {"tools": [TOOL]})
        user, calls = called("{}")["messages"]
        calls |= {"content": "a" * 2000, "tool_calls": calls["tool_calls"] * 100}
        assert ask(server.port, TOKENIZE, {"messages": [user, calls]}).json["count"] < 10_000
        server.assert_idle()
