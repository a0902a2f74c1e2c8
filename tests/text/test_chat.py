"""The chat format on a small byte tokenizer: rendering, refusals, parsing."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama32.text.chat import Chat
from llama32.text.tokenizer import Tokenizer
from tests.tokenizers import byte_tokenizer_json

DATE = "26 Jul 2024"
NAMES = "begin_of_text start_header_id end_header_id eot_id eom_id python_tag end_of_text"
CONTROLS = [f"<|{name}|>" for name in NAMES.split()]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
HI = {"role": "user", "content": "Hi"}


def tool_call_message(name: Any = "f", arguments: Any = None, **fields: Any) -> dict[str, Any]:
    """Return an assistant's message with one tool call."""
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    call = {"type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]} | fields


def name_and_arguments(message):
    """Return (name, arguments) of each call in a parsed message."""
    calls = [call["function"] for call in message["tool_calls"]]
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer_json(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def hub(tokenizer):
    return Chat(tokenizer)


@pytest.fixture(scope="module")
def meta(tokenizer):
    return Chat(tokenizer, style="meta")


def rendered(chat, messages, **options):
    return chat.tokenizer.decode(chat.encode(messages, **options))


def parsed(chat, text, end="<|eot_id|>"):
    """Parse the output of a model, given as text with control tokens."""
    return chat.parse(chat.tokenizer.encode(text + end, allow_special=True))


def controls(chat, ids):
    names = {chat.tokenizer.special[name]: name for name in CONTROLS}
    return [names[id] for id in ids if id in names]


# Rendering


def test_the_hub_style_renders_every_reference_dialog(hub, reference):
    cases = json.loads((reference / "chat_hf.json").read_text())["cases"]
    for case in cases.values():
        tools, date = case["kwargs"].get("tools"), case["kwargs"]["date_string"]
        assert rendered(hub, case["messages"], tools=tools, date=date) == case["text"]


def test_tools_can_stand_in_the_system_message(hub):
    messages = [{"role": "system", "content": " Be brief. "}, HI]
    text = rendered(hub, messages, tools=[WEATHER], date=DATE, tools_in_user_message=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "You have access to the following functions. To call a function, please respond with JSON "
        'for a function call.Respond in the format {"name": function name, "parameters": '
        "dictionary of argument name and its value}.Do not use variables.\n\n"
        + json.dumps(WEATHER, indent=4)
        + "\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_no_tools_and_no_calls_may_be_absent_null_or_empty(hub):
    answer = {"role": "assistant", "content": "Hi"}
    ids = hub.encode([HI, answer])
    for empty in (None, []):
        assert hub.encode([HI, answer | {"tool_calls": empty}], tools=empty) == ids


def test_the_hub_encodes_text_between_control_tokens_in_one_piece(hub, monkeypatch):
    texts = []
    monkeypatch.setattr(hub.tokenizer, "encode", lambda text: texts.append(text) or [])
    hub.encode([{"role": "system", "content": "Be brief."}, HI], date=DATE)
    day = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
    assert texts == ["system", f"\n\n{day}\n\nBe brief.", "user", "\n\nHi"]


def test_without_generation_prompt_a_dialog_ends_with_the_last_turn(hub, meta):
    for chat in (hub, meta):
        ids = chat.encode([HI], add_generation_prompt=False)
        assert controls(chat, ids[-1:]) == ["<|eot_id|>"]
        assert chat.encode([HI]) == ids + chat.prompt


def test_the_default_date_is_today_in_english(hub, monkeypatch):
    noon = time.mktime((2025, 5, 3, 12, 0, 0, 0, 0, -1))
    with monkeypatch.context() as frozen:
        frozen.setattr(time, "time", lambda: noon)
        ids = hub.encode([HI])
    assert ids == hub.encode([HI], date="03 May 2025")


def test_arguments_may_be_json_text_as_from_openai(hub, meta):
    arguments = {"city": "São Paulo", "days": [1, 2.5, None, True]}
    for chat in (hub, meta):
        as_text = chat.encode([HI, tool_call_message("f", json.dumps(arguments))])
        assert as_text == chat.encode([HI, tool_call_message("f", arguments)])


def test_text_parts_are_joined_for_every_role(hub, meta):
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "25 C"}]
    for chat in (hub, meta):
        for role in ("system", "user", "assistant", "tool"):
            joined = chat.encode([{"role": role, "content": parts}])
            assert joined == chat.encode([{"role": role, "content": "It is 25 C"}])


def test_a_tool_result_is_json_on_the_hub_and_unchanged_at_meta(hub, meta):
    for role in ("tool", "ipython"):
        text = {"role": role, "content": ' "25 °C" '}
        data = {"role": role, "content": [{"é": 25}]}
        assert 'ipython<|end_header_id|>\n\n" \\"25 °C\\" "<|eot_id|>' in rendered(hub, [text])
        assert '<|end_header_id|>\n\n "25 °C" <|eot_id|>' in rendered(meta, [text])
        for chat in (hub, meta):
            assert '<|end_header_id|>\n\n[{"é": 25}]<|eot_id|>' in rendered(chat, [data])


def test_the_hub_drops_the_content_beside_a_call_and_meta_keeps_it(hub, meta):
    message = tool_call_message("f", {"a": 1}, content="Let me see.")
    assert '\n\n{"name": "f", "parameters": {"a": 1}}<|eot_id|>' in rendered(hub, [message])
    call = '{"type": "function", "name": "f", "parameters": {"a": 1}}'
    assert f"\n\nLet me see.{call}<|eot_id|>" in rendered(meta, [message])


def test_meta_renders_calls_as_json_or_as_a_python_list(meta):
    message = tool_call_message("f", {"s": "é", "l": [1, "a"], "d": {"k": None}})
    as_json = '{"type": "function", "name": "f", "parameters": '
    as_json += '{"s": "\\u00e9", "l": [1, "a"], "d": {"k": null}}}'
    assert as_json in rendered(meta, [message])
    as_python = rendered(meta, [message], tool_prompt_format="python_list")
    assert '\n\n[f(s="é", l=[1, "a"], d={k=None})]<|eot_id|>' in as_python


def test_meta_renders_code_between_the_python_tag_and_eom(meta):
    ids = meta.encode(
        [tool_call_message("code_interpreter", {"code": "1 + 1"})], add_generation_prompt=False
    )
    assert meta.tokenizer.decode(ids).endswith("\n\n<|python_tag|>1 + 1<|eom_id|>")
    assert controls(meta, ids)[-2:] == ["<|python_tag|>", "<|eom_id|>"]
    without_code = tool_call_message("code_interpreter", {"code": 1})
    assert '{"type": "function", "name": "code_interpreter"' in rendered(meta, [without_code])


# Text never becomes control tokens

NASTY = st.lists(st.sampled_from([*CONTROLS, "\n\n", "user", " ", "é", '"', "}"])).map("".join)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(NASTY, min_size=8, max_size=8))
def test_no_text_of_users_models_or_tools_becomes_a_control_token(hub, meta, texts):
    system, user, name, key, value, result, tool, date = texts
    dialog = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        tool_call_message(name or "f", {key: value}),
        {"role": "tool", "content": result},
        {"role": "tool", "content": {key: [value]}},
    ]
    turn = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    expected = ["<|begin_of_text|>", *turn * 5]
    for in_user in (True, False):
        ids = hub.encode(dialog, [{tool: tool}], date, False, tools_in_user_message=in_user)
        assert controls(hub, ids) == expected
    for form in ("json", "python_list"):
        ids = meta.encode(dialog, add_generation_prompt=False, tool_prompt_format=form)
        assert controls(meta, ids) == expected


# Refusals


def test_a_tokenizer_without_control_tokens_has_no_chat_format(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "special", {"<|eot_id|>": 5})
    with pytest.raises(ValueError, match=r"no chat format.*<\|begin_of_text\|>.*use generate") as e:
        Chat(tokenizer)
    assert "eot_id" not in str(e.value)


def test_a_tokenizer_without_tool_tokens_chats_in_the_hub_style_only(tokenizer, monkeypatch):
    special = {name: tokenizer.special[name] for name in CONTROLS[:4]}
    monkeypatch.setattr(tokenizer, "special", special)
    chat = Chat(tokenizer)
    assert chat.stop_ids == {special["<|eot_id|>"]}
    assert chat.parse(chat.tokenizer.encode("Hi"))["content"] == "Hi"
    with pytest.raises(ValueError, match=r"<\|eom_id\|>, <\|python_tag\|>"):
        Chat(tokenizer, style="meta")


def test_all_three_stop_tokens_end_a_turn(hub):
    special = hub.tokenizer.special
    assert hub.stop_ids == {special[f"<|{n}|>"] for n in ("eot_id", "eom_id", "end_of_text")}


MALFORMED = {
    "messages: expected a list": [None, [], {}, "Hi"],
    r"messages\[0\]: expected a dict": [["Hi"], [None]],
    r"messages\[0\]: role is .*, allowed: system, user, assistant, ipython, tool": [
        [{"content": "Hi"}],
        [{"role": "robot", "content": "Hi"}],
        [{"role": ["user"], "content": "Hi"}],
    ],
    r"messages\[1\]: content must be text": [
        [HI, {"role": "user"}],
        [HI, {"role": "user", "content": 5}],
        [HI, {"role": "user", "content": {"a": 1}}],
        [HI, {"role": "user", "content": []}],
        [HI, {"role": "user", "content": [{"type": "image_url"}]}],
        [HI, {"role": "user", "content": [{"text": "Hi"}]}],
        [HI, {"role": "user", "content": [{"type": "text", "text": 5}]}],
        [HI, {"role": "assistant", "tool_calls": []}],
        [HI, {"role": "tool", "content": None}],
    ],
    "not valid in JSON: Object of type set": [[{"role": "tool", "content": {"a": {1}}}]],
    "only the assistant may have tool_calls": [[tool_call_message(role="user", content="Hi")]],
    "tool_calls must look like": [
        *(
            [tool_call_message(tool_calls=calls)]
            for calls in (5, {"name": "f"}, [5], [{"function": "f"}])
        ),
        *([tool_call_message(name=name)] for name in ("", 5, None)),
        *(
            [tool_call_message(arguments=arguments)]
            for arguments in ([1], "{", "[" * 99_999, {"a": {1}})
        ),
    ],
}


@pytest.mark.parametrize("problem", MALFORMED)
def test_a_malformed_dialog_is_refused_in_one_line(hub, meta, problem):
    for messages in MALFORMED[problem]:
        for chat in (hub, meta):
            with pytest.raises(ValueError, match=problem) as error:
                chat.encode(messages)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("tools", [5, "f", {"name": "f"}, ["f"], [{"f": {1}}]])
def test_malformed_tools_are_refused(hub, tools):
    with pytest.raises(ValueError, match=r"^tools: "):
        hub.encode([HI], tools)


@pytest.mark.parametrize("dialog", [[{"role": "system", "content": "x"}], [tool_call_message()]])
def test_tools_without_a_first_user_message_are_refused_or_stand_in_the_system_message(hub, dialog):
    with pytest.raises(ValueError, match="tools_in_user_message=False"):
        hub.encode(dialog, [WEATHER])
    hub.encode(dialog, [WEATHER], tools_in_user_message=False)


def test_the_hub_takes_one_tool_call_a_message_and_meta_any_number(hub, meta):
    message = tool_call_message("f")
    message["tool_calls"] *= 2
    with pytest.raises(ValueError, match="one tool call a message"):
        hub.encode([HI, message])
    one = '{"type": "function", "name": "f", "parameters": {}}'
    assert one + one + "<|eot_id|>" in rendered(meta, [HI, message])


def test_meta_refuses_tools_date_and_unknown_formats(meta):
    for unwanted in ({"tools": [WEATHER]}, {"date": DATE}):
        with pytest.raises(ValueError, match="'meta' has no tools or date"):
            meta.encode([HI], **unwanted)
    with pytest.raises(ValueError, match="use 'json' or 'python_list'"):
        meta.encode([HI], tool_prompt_format="xml")


def test_an_unknown_style_is_refused(tokenizer):
    with pytest.raises(ValueError, match="unknown style 'chatml'"):
        Chat(tokenizer, style="chatml")


# Parsing

F, G = '{"name": "f", "parameters": {}}', '{"name": "g", "parameters": {}}'


@pytest.mark.parametrize("end", ["", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot_id|>x"])
@pytest.mark.parametrize("start", ["", "<|start_header_id|>assistant<|end_header_id|>\n\n"])
def test_header_and_stop_token_are_not_content(hub, start, end):
    message = {"role": "assistant", "content": " Hello\n", "tool_calls": []}
    assert parsed(hub, start + " Hello\n", end) == message


CALLS = {
    '{"name": "f", "parameters": {"a": 1}}': [("f", {"a": 1})],
    '{"name": "f", "arguments": {"a": 1}}': [("f", {"a": 1})],
    '{"name": "f", "arguments": "{\\"a\\": 1}"}': [("f", {"a": 1})],
    ' {"type": "function", "name": "f", "parameters": {}}\n': [("f", {})],
    '{"type": "function", "function": {"name": "f", "arguments": {}}}': [("f", {})],
    f"{F}; {G}": [("f", {}), ("g", {})],
    f"{F}\n{G}": [("f", {}), ("g", {})],
    f"[{F}, {G}]": [("f", {}), ("g", {})],
    "[f(a='x', b=1), g()]": [("f", {"a": "x", "b": 1}), ("g", {})],
    '[f(a=[1, {"k": None}], b=-0.5)]': [("f", {"a": [1, {"k": None}], "b": -0.5})],
    "[math.sqrt(x=(1, 2))]": [("math.sqrt", {"x": [1, 2]})],
    "[f(path='C:\\dir')]": [("f", {"path": "C:\\dir"})],
}


@pytest.mark.parametrize("text", CALLS)
@pytest.mark.parametrize("tag", ["", "<|python_tag|>"])
def test_tool_calls_are_parsed_in_every_form_that_models_write(hub, tag, text):
    message = parsed(hub, tag + text)
    assert message["content"] == ""
    assert name_and_arguments(message) == CALLS[text]


def test_calls_are_numbered_in_openais_form(hub):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls = [{"id": "call_0", **call}, {"id": "call_1", **call}]
    assert parsed(hub, "[f(), f()]")["tool_calls"] == calls


NOT_CALLS = [
    *["5", "null", "[]", "{}", "[1, 2]", "[f(1)]", "[f(x)]", "[f(**{})]", "[f(x={1, 2})]"],
    *["[f(x=b'')]", "[f(x=g())]", "[f()] + [g()]", "[f()(x=1)]", "[f(), 5]", "[f("],
    *["[f() for x in y]", "f(x=1)", "(f(), g())", "[f(x='\x00')]", "[[f()]]", "[f()] [g()]"],
    *(f"{F} and more", f"Call {F}", F[:-1], f"[[{F}]]", f"{F}, {G}", ""),
    '{"name": "Anna"}',
    '{"name": "Anna", "parameters": 5}',
    '{"name": "Anna", "parameters": {}, "age": 5}',
    '{"name": "", "parameters": {}}',
    '{"name": 5, "parameters": {}}',
    '{"name": "f", "description": "the tool itself, said back", "parameters": {}}',
    '{"type": "person", "name": "Anna", "parameters": {}}',
    '{"function": ["name", "arguments"]}',
    '{"name": "f", "parameters": {"x": NaN}}',
    '{"name": "f", "parameters": {"x": 1e999}}',
]


@pytest.mark.parametrize("text", NOT_CALLS)
def test_text_that_only_looks_like_a_call_stays_content(hub, text):
    assert parsed(hub, text) == {"role": "assistant", "content": text, "tool_calls": []}


def test_a_pythonic_call_is_parsed_and_never_run(hub, tmp_path):
    made = tmp_path / "made"
    text = f"[f(x=__import__('os').mkdir({str(made)!r}))]"
    assert parsed(hub, text)["content"] == text
    assert not made.exists()


@pytest.mark.parametrize("text", ["print(1)", " x = [1]\nx", '{"name": "f"', ""])
def test_other_text_behind_the_python_tag_is_code(hub, text):
    for end in ("<|eom_id|>", ""):
        message = parsed(hub, "<|python_tag|>" + text, end)
        assert message["content"] == ""
        assert name_and_arguments(message) == [("code_interpreter", {"code": text})]


def test_the_text_of_the_python_tag_is_not_a_control_token(hub):
    ids = hub.tokenizer.encode("<|python_tag|>print(1)")
    assert hub.parse(ids)["content"] == "<|python_tag|>print(1)"


HOSTILE = ("[f(x=", "[", "(", '{"a":', "-", "1+", "a.", "()", "\0", "9")
LOOKALIKES = st.text(alphabet="[]{}(),;:=\"'\\ \n.ftrue01aé", max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), LOOKALIKES, LOOKALIKES.map("[f({})]".format)))
def test_any_text_is_parsed_and_the_message_can_be_encoded(hub, meta, text):
    for chat in (hub, meta):
        message = chat.parse(chat.tokenizer.encode(text))
        assert message["tool_calls"] or message["content"] == text
        if len(message["tool_calls"]) < 2:
            chat.encode([HI, message])


@pytest.mark.parametrize("text", HOSTILE)
def test_deeply_nested_text_is_parsed(hub, text):
    for start in ("", "[f(x=", '{"name": "f", "parameters": {"a": '):
        deep = start + text * (20_000 // len(text))
        assert parsed(hub, deep)["content"] == deep


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_are_parsed(hub, data):
    known = [*hub.tokenizer.special.values(), *hub.tokenizer.encode("abc [f()] {}\né")]
    ids = data.draw(st.lists(st.sampled_from(known)))
    message = hub.parse(ids)
    assert isinstance(message["content"], str)


@pytest.mark.parametrize("text", ["Hello!", F, "[f(a='é')]"])
def test_a_parsed_message_can_be_encoded_in_the_dialog(hub, meta, text):
    for chat in (hub, meta):
        message = parsed(chat, text)
        ids = chat.encode([HI, message], add_generation_prompt=False)
        start = len(chat.encode([HI]))
        assert chat.parse(ids[start:]) == message
        assert chat.parse([*chat.prompt, *ids[start:]]) == message
