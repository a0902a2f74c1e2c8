"""Messages and tools <-> ids: the Llama 3 chat format, as the Hub renders it and as Meta does.

A style renders a dialog into segments, each a text or a control token, and only `Chat.to_ids`
makes ids of them. Text stays text, so no message can end its own turn or forge another's.
Every text segment is encoded by itself: where a style cuts its texts decides the exact ids.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from email.utils import formatdate
from enum import Enum
from functools import partial
from itertools import takewhile
from typing import Any

from llama32.calls import UNREADABLE, Call, parse_calls, plain, read_call, require
from llama32.tokenizer import Tokenizer


class Control(Enum):
    """The control tokens. The style hub writes the first four, meta the first six."""

    BEGIN = "<|begin_of_text|>"
    HEADER = "<|start_header_id|>"
    HEADER_END = "<|end_header_id|>"
    EOT = "<|eot_id|>"  # end of turn
    EOM = "<|eom_id|>"  # end of message: a tool answers, then the turn goes on
    PYTHON = "<|python_tag|>"  # what follows is for a tool
    EOS = "<|end_of_text|>"


Segment = str | Control
Message = tuple[str, Any, list[Call]]  # role in the header, text (or a tool's data), calls


class Chat:
    """Dialogs <-> ids of one tokenizer, in the style "hub" (as Instruct is served) or "meta".

    `stop_ids` end an assistant's turn. ValueError where the tokenizer lacks control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, style: str = "hub") -> None:
        require(style in STYLES, f"chat: unknown style {style!r}; use 'hub' or 'meta'")
        special = tokenizer.special
        needed = [c.value for c in Control][: 4 if style == "hub" else 6]
        missing = ", ".join(token for token in needed if token not in special)
        require(not missing, f"this checkpoint has no chat format (lacks {missing}); use generate")
        self.tokenizer = tokenizer
        self.render = STYLES[style]
        self.control = {c: special[c.value] for c in Control if c.value in special}
        stops = (Control.EOT, Control.EOM, Control.EOS)
        self.stop_ids = frozenset(self.control[c] for c in stops if c in self.control)
        self.prompt = self.to_ids(_header("assistant", "\n\n"))  # asks for an answer

    def to_ids(self, segments: Iterable[Segment]) -> list[int]:
        """The only door to control ids; no text passes it."""
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
        """The ids of a dialog, with an open assistant header that asks for the answer.

        Messages and tools are those of OpenAI's chat API, just as JSON gives them: what is
        wrong in them raises ValueError. `date` is like "26 Jul 2024"; None means today.
        `options` are those of the style: see `hub` and `meta`.
        """
        ok = isinstance(messages, list | tuple) and messages
        require(ok, f"messages: expected a list with a message in it, got {messages!r:.60}")
        dialog = [_read_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
        segments = self.render(dialog, _read_tools(tools), date, **options)
        prompt = self.prompt if add_generation_prompt else []
        return self.to_ids([Control.BEGIN, *segments]) + prompt

    def answers(self, ids: list[int]) -> Iterator[range]:
        """Where in the ids of a dialog the assistant speaks: what a model would have to write in
        place of each of its messages, with the token that ends it. Control ids come from the
        format alone, so nobody else's message can pass for one."""
        n = len(self.prompt)
        for start in range(n, len(ids)):
            if ids[start - n : start] == self.prompt:
                stops = (at for at in range(start, len(ids)) if ids[at] in self.stop_ids)
                yield range(start, next(stops, len(ids) - 1) + 1)

    def parse(self, ids: Iterable[int]) -> dict[str, Any]:
        """The message that a model wrote, in OpenAI's shape; `encode` takes it back. See `read`."""
        return self.read(ids)[0]

    def read(self, ids: Iterable[int]) -> tuple[dict[str, Any], str | None]:
        """The message that a model wrote; and where it looks like a tool call and is none, why.

        The header before it and the stop token behind it may be there or not. A text that is
        nothing but tool calls becomes `tool_calls` and leaves no content. They are numbered
        ("call_0", ...), so the same ids give the same message. What stands behind
        <|python_tag|> and is no such call is code: a call of `code_interpreter`.
        """
        ids = list(takewhile(lambda id: id not in self.stop_ids, ids))
        if ids[: len(self.prompt)] == self.prompt:
            ids = ids[len(self.prompt) :]
        tagged = ids[:1] == [self.control.get(Control.PYTHON)]
        text = self.tokenizer.decode(ids[tagged:])
        calls, problem = parse_calls(text)
        if tagged and not calls:
            calls, problem = [("code_interpreter", {"code": text})], None
        tool_calls = [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": given}}
            for i, (name, given) in enumerate(calls)
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


def hub(
    dialog: list[Message], tools: list, date: str | None, tools_in_user_message: bool = True
) -> list[Segment]:
    """The template that Llama 3.2 Instruct carries on the Hub, with its habits.

    Contents are trimmed, a tool's result is JSON even where it is text, and what is said
    beside a call is dropped. (`chat_template` in tokenizer_config.json)
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
        hint = "messages: tools need a first message by the user, or tools_in_user_message=False"
        require(turns and turns[0][0] == "user", hint)
        turns[0] = ("user", TOOLS_IN_USER + schemas + turns[0][1])
    turns.insert(0, ("system", system))
    return [s for role, text in turns for s in (*_header(role, "\n\n" + text), Control.EOT)]


def _hub_text(role: str, content: Any, calls: list[Call]) -> str:
    require(len(calls) < 2, "messages: the style 'hub' takes one tool call a message; keep one")
    if calls:
        content = {"name": calls[0][0], "parameters": calls[0][1]}
    return to_json(content) if calls or role == "ipython" else content.strip()


def meta(
    dialog: list[Message], tools: list, date: str | None, tool_prompt_format: str = "json"
) -> list[Segment]:
    """Meta's own ChatFormat: every message as it is, and nothing added.

    `tool_prompt_format` is how a call is shown again: "json", or "python_list", which is how
    Llama 3.2 was taught to write it. (`llama_models/llama3/chat_format.py`)
    """
    bare = not tools and date is None
    require(bare, "chat: 'meta' has no tools or date; put them in the system message or use 'hub'")
    known = tool_prompt_format in ("json", "python_list")
    require(known, f"chat: tool_prompt_format {tool_prompt_format!r}; use 'json' or 'python_list'")
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
    """What Meta writes, not quite Python: quotes stay unescaped, a dict is {key=value}."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_python_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}={_python_text(v)}' for k, v in value.items())}}}"
    return str(value)


STYLES = {"hub": hub, "meta": meta}
HEADERS = {r: r for r in ("system", "user", "assistant", "ipython")} | {"tool": "ipython"}


def _read_tools(tools: Any) -> list[dict[str, Any]]:
    tools = plain("tools", tools or [])
    ok = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    require(ok, f"tools: expected a list of dicts, got {tools!r:.60}")
    return tools


def _read_message(where: str, message: Any) -> Message:
    require(isinstance(message, Mapping), f"{where}: expected a dict, got {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    require(role in list(HEADERS), f"{where}: role {role!r:.60} is none of {', '.join(HEADERS)}")
    try:
        calls = [read_call(call) for call in message.get("tool_calls") or []]
    except UNREADABLE:
        shape = "[{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}, ...]"
        raise ValueError(f"{where}: tool_calls must look like {shape}") from None
    require(role == "assistant" or not calls, f"{where}: only the assistant has tool_calls")
    if content is None and calls:
        content = ""
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    kinds = str | dict | list if HEADERS[role] == "ipython" else str
    require(isinstance(content, kinds), f"{where}: content must be text, got {content!r:.60}")
    return HEADERS[role], plain(where, content), calls


def _is_text(part: Any) -> bool:
    match part:
        case {"type": "text", "text": str()}:
            return True
    return False
