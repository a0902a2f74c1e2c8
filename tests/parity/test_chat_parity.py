"""Ids of the chat format, with the real Llama 3 tokenizer from Meta's package."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from llama32.text.chat import Chat
from llama32.text.tokenizer import Tokenizer

HUB_CASES = (
    "user",
    "multi_turn",
    "trimmed",
    "tools_in_user",
    "tool_call_and_result",
    "long",
    "code",
)


@pytest.fixture(scope="module")
def tokenizer():
    package = importlib.util.find_spec("llama_models")
    if package is None or package.origin is None:
        pytest.skip("llama-models is not installed: it brings the Llama 3 tokenizer")
    return Tokenizer.load(Path(package.origin).parent / "llama3" / "tokenizer.model")


@pytest.fixture(scope="module")
def hub(tokenizer):
    return Chat(tokenizer)


@pytest.fixture(scope="module")
def meta(tokenizer):
    return Chat(tokenizer, style="meta")


def hub_case(reference, name):
    case = json.loads((reference / "chat_hf.json").read_text())["cases"][name]
    tools, date = case["kwargs"].get("tools"), case["kwargs"]["date_string"]
    return case, {"tools": tools, "date": date}


def meta_cases(reference, kind):
    return json.loads((reference / "chat_meta.json").read_text())[kind]


def as_openai(message):
    """Return a message with Meta's fields in OpenAI's form."""
    calls = [
        {"function": {"name": call["tool_name"], "arguments": call["arguments"]}}
        for call in message["tool_calls"]
    ]
    return {"role": message["role"], "content": message["content"], "tool_calls": calls}


@pytest.mark.parametrize("name", HUB_CASES)
def test_the_hub_style_gives_the_ids_of_the_hubs_template(hub, reference, name):
    case, options = hub_case(reference, name)
    assert hub.encode(case["messages"], **options) == case["ids"]


def test_only_control_text_in_a_message_differs_from_the_hub(hub, reference):
    case, options = hub_case(reference, "special_text")
    ours, theirs = hub.encode(case["messages"], **options), case["ids"]
    assert hub.tokenizer.decode(ours) == hub.tokenizer.decode(theirs) == case["text"]
    content = case["messages"][0]["content"]
    plain = hub.tokenizer.encode("\n\n" + content)
    control = hub.tokenizer.encode("\n\n" + content, allow_special=True)
    assert not set(plain) & set(hub.tokenizer.special.values())
    start = len(hub.encode([{"role": "user", "content": ""}], date=options["date"]))
    start -= len(hub.prompt) + 2  # before the empty message's "\n\n" and <|eot_id|>
    assert ours[:start] == theirs[:start]
    assert ours[start : start + len(plain)] == plain
    assert theirs[start : start + len(control)] == control
    assert ours[start + len(plain) :] == theirs[start + len(control) :]


def test_the_meta_style_gives_the_ids_of_metas_chat_format(meta, reference):
    for case in meta_cases(reference, "dialogs"):
        messages = [as_openai(message) for message in case["messages"]]
        ids = meta.encode(messages, tool_prompt_format=case["tool_prompt_format"])
        assert ids == case["ids"], case["name"]


def test_parse_agrees_with_metas_chat_format(meta, reference):
    for case in meta_cases(reference, "decode_assistant"):
        ids = meta.tokenizer.encode(case["input"], allow_special=True)
        message, expected = meta.parse(ids), as_openai(case["message"])
        functions = [{"function": call["function"]} for call in message["tool_calls"]]
        assert {**message, "tool_calls": functions} == expected, case["input"]


def some_text(rng):
    parts = ["Hello", *' \n"\\é', "\n\n", "你好", "🙂🏽", "<|eot_id|>", "12", "[1]"]
    return "".join(rng.choices(parts, k=rng.randrange(6)))


def some_arguments(rng):
    def scalar():
        return rng.choice([some_text(rng), rng.randrange(-99, 99), 0.25, True, None])

    values = [scalar(), [scalar(), scalar()], {"k": scalar()}]
    return {key: rng.choice(values) for key in rng.sample(["a", "city", "ü"], k=rng.randrange(4))}


def some_call(rng):
    if rng.random() < 0.3:
        return "code_interpreter", {"code": some_text(rng)}
    return rng.choice(["f", "get_weather"]), some_arguments(rng)


def test_random_dialogs_get_the_ids_of_metas_own_code(meta):
    raw_types = pytest.importorskip("llama_models.datatypes")
    chat_format = pytest.importorskip("llama_models.llama3.chat_format", exc_type=ImportError)
    theirs = chat_format.ChatFormat(chat_format.Tokenizer.get_instance())
    rng = random.Random(0)
    for _ in range(200):
        messages, raw = [], []
        for role in rng.choices(["system", "user", "assistant", "tool"], k=rng.randrange(1, 5)):
            calls = [some_call(rng) for _ in range(rng.randrange(3))] if role == "assistant" else []
            content = some_text(rng)
            functions = [{"function": {"name": n, "arguments": a}} for n, a in calls]
            messages.append({"role": role, "content": content, "tool_calls": functions})
            fields = {}
            if role == "assistant":
                is_code = bool(calls) and calls[0][0] == "code_interpreter"
                stop = "end_of_message" if is_code else "end_of_turn"
                fields["stop_reason"] = raw_types.StopReason[stop]
                fields["tool_calls"] = [
                    raw_types.ToolCall(call_id="", tool_name=n, arguments=a) for n, a in calls
                ]
            raw.append(raw_types.RawMessage(role=role, content=content, **fields))
        form = rng.choice(["json", "python_list"])
        expected = theirs.encode_dialog_prompt(raw, raw_types.ToolPromptFormat[form]).tokens
        assert meta.encode(messages, tool_prompt_format=form) == expected
