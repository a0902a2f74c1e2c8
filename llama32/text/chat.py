"""The Llama 3 chat format: messages and tools to token ids and back, in the Hub's or Meta's style.

A style renders a dialog into segments (texts or control tokens), and only `Chat.to_ids` turns
segments into ids. Text stays text: no message can end its own turn or forge another turn. Every
text segment is encoded alone, so the exact ids depend on the borders between texts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from email.utils import formatdate
from enum import Enum
from functools import partial
from itertools import takewhile
from typing import Any

from llama32.text.tokenizer import Tokenizer
from llama32.text.tool_calls import PARSE_ERRORS, Call, json_copy, parse_call, parse_calls, require


class Control(Enum):
    """Control tokens. The style "hub" writes the first four, "meta" the first six."""

    BEGIN = "<|begin_of_text|>"
    HEADER = "<|start_header_id|>"
    HEADER_END = "<|end_header_id|>"
    EOT = "<|eot_id|>"  # end of turn
    EOM = "<|eom_id|>"  # end of message: a tool result follows, then the turn continues
    PYTHON = "<|python_tag|>"  # code or a call for a tool follows
    EOS = "<|end_of_text|>"


Segment = str | Control
Message = tuple[str, Any, list[Call]]  # role in the header, content (text or JSON), tool calls


class Chat:
    """The chat format of one tokenizer, in the style "hub" (Instruct's template) or "meta".

    `stop_ids` end an assistant's turn. Raises ValueError if the tokenizer lacks control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, style: str = "hub") -> None:
        require(style in STYLES, f"chat: unknown style {style!r}; use 'hub' or 'meta'")
        special = tokenizer.special
        needed = [c.value for c in Control][: 4 if style == "hub" else 6]
        missing = ", ".join(token for token in needed if token not in special)
        require(not missing, f"this checkpoint has no chat format (lacks {missing}); use generate")
        self.tokenizer = tokenizer
        self.style, self.render = style, STYLES[style]
        self.control = {c: special[c.value] for c in Control if c.value in special}
        stops = (Control.EOT, Control.EOM, Control.EOS)
        self.stop_ids = frozenset(self.control[c] for c in stops if c in self.control)
        self.prompt = self.to_ids(_header("assistant", "\n\n"))  # the generation prompt

    def to_ids(self, segments: Iterable[Segment]) -> list[int]:
        """Return the ids of segments. Control ids come only from here, and never from text."""
        ids = []
        for segment in segments:
            is_text = isinstance(segment, str)
            ids += self.tokenizer.encode(segment) if is_text else [self.control[segment]]
        return ids

    def encode(
        self,
        messages: Any,
        tools: Any = None,
        date: str | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Return the ids of a dialog, with an open assistant header as generation prompt.

        `messages` and `tools` have the JSON form of OpenAI's chat API. `date` is like
        "26 Jul 2024"; None means today. `options` belong to the style: see `render_hub` and
        `render_meta`. Raises ValueError for invalid messages and tools.
        """
        ok = isinstance(messages, list | tuple) and messages
        require(ok, f"messages: expected a list with at least one message, got {messages!r:.60}")
        dialog = [_parse_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
        segments = self.render(dialog, _check_tools(tools), date, **options)
        prompt = self.prompt if add_generation_prompt else []
        return self.to_ids([Control.BEGIN, *segments]) + prompt

    def assistant_spans(self, ids: list[int]) -> Iterator[range]:
        """Yield the range of each assistant message in the ids of a dialog, with the stop token.

        The ranges cover exactly the tokens that a model has to generate. Control ids come from the
        format alone, so no other message can imitate an assistant message.
        """
        n = len(self.prompt)
        for start in range(n, len(ids)):
            if ids[start - n : start] == self.prompt:
                stops = (i for i in range(start, len(ids)) if ids[i] in self.stop_ids)
                yield range(start, next(stops, len(ids) - 1) + 1)

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """Return the message in a model's output, in OpenAI's form, ready for `encode`.

        See `parse_with_problem`.
        """
        return self.parse_with_problem(ids)[0]

    def parse_with_problem(self, ids: Iterable[int]) -> tuple[dict[str, Any], str | None]:
        """Return the message in a model's output, and the problem of a broken tool call, or None.

        Header and stop token are optional. Text that consists of tool calls alone becomes
        `tool_calls` without content. Calls are numbered ("call_0", ...), so equal ids give equal
        messages. Any other text after <|python_tag|> is code: a call of `code_interpreter`.
        """
        ids = list(takewhile(lambda id: id not in self.stop_ids, ids))
        if ids[: len(self.prompt)] == self.prompt:
            ids = ids[len(self.prompt) :]
        is_tagged = ids[:1] == [self.control.get(Control.PYTHON)]
        text = self.tokenizer.decode(ids[is_tagged:])
        calls, problem = parse_calls(text)
        if is_tagged and not calls:
            calls, problem = [("code_interpreter", {"code": text})], None
        tool_calls = [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": args}}
            for i, (name, args) in enumerate(calls)
        ]
        content = "" if calls else text
        return {"role": "assistant", "content": content, "tool_calls": tool_calls}, problem


CALL_FORMAT = (
    'Respond in the format {"name": function name, "parameters": '
    "dictionary of argument name and its value}.Do not use variables.\n\n"
)
TOOLS_IN_SYSTEM = (
    "You have access to the following functions. To call a function, "
    "please respond with JSON for a function call." + CALL_FORMAT
)
TOOLS_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n" + CALL_FORMAT
)
to_json = partial(json.dumps, ensure_ascii=False)


def _header(role: str, *texts: str) -> list[Segment]:
    return [Control.HEADER, role, Control.HEADER_END, *texts]


def render_hub(
    dialog: list[Message], tools: list, date: str | None, tools_in_user_message: bool = True
) -> list[Segment]:
    """Render a dialog as the template of Llama 3.2 Instruct on the Hub does.

    The template trims contents, writes tool results (text too) as JSON, and drops the content of a
    message with a tool call. (`chat_template` in tokenizer_config.json)
    """
    date = date or formatdate(localtime=True)[5:16]  # today, in English whatever the locale
    system = "Environment: ipython\n" if tools else ""
    system += f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    schemas = "".join(to_json(tool, indent=4) + "\n\n" for tool in tools)
    if tools and not tools_in_user_message:
        system += TOOLS_IN_SYSTEM + schemas
    turns = [(message[0], _hub_text(*message)) for message in dialog]
    if turns[0][0] == "system":
        system += turns.pop(0)[1]
    if tools and tools_in_user_message:
        advice = "messages: tools need a first message by the user, or tools_in_user_message=False"
        require(turns and turns[0][0] == "user", advice)
        turns[0] = ("user", TOOLS_IN_USER + schemas + turns[0][1])
    turns.insert(0, ("system", system))
    return [part for role, text in turns for part in (*_header(role, "\n\n" + text), Control.EOT)]


def _hub_text(role: str, content: Any, calls: list[Call]) -> str:
    advice = "messages: the style 'hub' takes one tool call a message; use a message for each call"
    require(len(calls) < 2, advice)
    if calls:
        content = {"name": calls[0][0], "parameters": calls[0][1]}
    return to_json(content) if calls or role == "ipython" else content.strip()


def render_meta(
    dialog: list[Message], tools: list, date: str | None, tool_prompt_format: str = "json"
) -> list[Segment]:
    """Render a dialog as Meta's ChatFormat does: messages unchanged, nothing added.

    `tool_prompt_format` sets the form of tool calls in the dialog: "json", or "python_list", the
    form that Llama 3.2 was trained on. (`llama_models/llama3/chat_format.py`)
    """
    advice = "chat: 'meta' has no tools or date; put them in the system message or use 'hub'"
    require(not tools and date is None, advice)
    advice = f"chat: tool_prompt_format {tool_prompt_format!r}; use 'json' or 'python_list'"
    require(tool_prompt_format in ("json", "python_list"), advice)
    segments = []
    for role, content, calls in dialog:
        is_code = bool(calls) and calls[0][0] == "code_interpreter"
        segments += [*_header(role, "\n\n"), *[Control.PYTHON] * is_code]
        segments += [content if isinstance(content, str) else to_json(content)]
        segments += [_meta_text(call, tool_prompt_format) for call in calls]
        segments += [Control.EOM if is_code else Control.EOT]
    return segments


def _meta_text(call: Call, tool_prompt_format: str) -> str:
    name, arguments = call
    if name == "code_interpreter" and isinstance(arguments.get("code"), str):
        return arguments["code"]
    if tool_prompt_format == "json":
        return json.dumps({"type": "function", "name": name, "parameters": arguments})
    return f"[{name}({_python_text(arguments)[1:-1]})]"


def _python_text(value: Any) -> str:
    """Return a value in Meta's variant of Python: quotes unescaped, dicts as {key=value}."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_python_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}={_python_text(v)}' for k, v in value.items())}}}"
    return str(value)


STYLES = {"hub": render_hub, "meta": render_meta}
HEADER_ROLES = {r: r for r in ("system", "user", "assistant", "ipython")} | {"tool": "ipython"}


def _check_tools(tools: Any) -> list[dict[str, Any]]:
    tools = json_copy("tools", tools or [])
    ok = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    require(ok, f"tools: expected a list of dicts, got {tools!r:.60}")
    return tools


def _parse_message(place: str, message: Any) -> Message:
    """Return a checked message. Errors begin with `place`, such as "messages[0]"."""
    require(isinstance(message, Mapping), f"{place}: expected a dict, got {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    require(
        role in list(HEADER_ROLES),
        f"{place}: role is {role!r:.60}, allowed: {', '.join(HEADER_ROLES)}",
    )
    try:
        calls = [parse_call(call) for call in message.get("tool_calls") or []]
    except PARSE_ERRORS:
        shape = "[{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}, ...]"
        raise ValueError(f"{place}: tool_calls must look like {shape}") from None
    require(role == "assistant" or not calls, f"{place}: only the assistant may have tool_calls")
    if content is None and calls:
        content = ""
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    kinds = str | dict | list if HEADER_ROLES[role] == "ipython" else str
    require(isinstance(content, kinds), f"{place}: content must be text, got {content!r:.60}")
    return HEADER_ROLES[role], json_copy(place, content), calls


def _is_text(part: Any) -> bool:
    """True for a text part of OpenAI's API."""
    match part:
        case {"type": "text", "text": str()}:
            return True
    return False
