"""Tool calls in what a model writes: read in all the forms that Llama 3 uses, and never run.

A message that consists of calls is JSON, `{"name": "f", "parameters": {...}}`, one or several in a
list or in a row; or a list of calls as Python spells them, `[f(x=1), g()]`. Anything else is text.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import regex

Call = tuple[str, dict[str, Any]]  # of a tool: its name and the arguments
# Of json and ast; SystemError was seen once of ast.parse, in CPython 3.11 beside other threads.
UNREADABLE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, SystemError)


# What a message of calls begins with, matched in part while it is being written.
JSON_CALL = regex.compile(
    r'\s*\[?\s*\{\s*"(?:type|name|function|parameters|arguments)"\s*:.*', regex.DOTALL
)
PYTHON_CALL = regex.compile(r"\s*\[\s*[^\W\d][\w.]*\(.*", regex.DOTALL)


def require(ok: object, problem: str) -> None:
    """ValueError with the problem, if there is one."""
    if not ok:
        raise ValueError(problem)


def plain(where: str, value: Any) -> Any:
    """A copy of value as JSON would carry it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except UNREADABLE as error:
        raise ValueError(f"{where}: JSON cannot carry it: {error}") from None


def read_call(value: Any) -> Call:
    """A call as OpenAI spells it or as models do, arguments as a dict or as the JSON of one."""
    function = value.get("function", value) if isinstance(value, Mapping) else value
    require(isinstance(function, Mapping), "a call is an object")
    spelled = function.keys() - {"type"} in ({"name", "arguments"}, {"name", "parameters"})
    require(spelled, "a call has a name and parameters, and nothing else")
    require(function.get("type", "function") == "function", "its type is not function")
    name, arguments = function["name"], function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    require(name and isinstance(name, str), "its name is not a text")
    require(isinstance(arguments, dict), "its parameters are not an object")
    return name, plain("arguments", arguments)


def parse_calls(text: str) -> tuple[list[Call], str | None]:
    """The calls that a text consists of; or none, and if it begins like one, why it is none."""
    problem = None
    for begins, parse in ((JSON_CALL, _json_calls), (PYTHON_CALL, _python_calls)):
        try:
            return parse(text.strip()), None
        except UNREADABLE as error:
            if begins.match(text):
                problem = f"begins like a tool call, but is none: {error}"
    return [], problem


class HeldCalls:
    """Lets text through, but nothing of what may become tool calls: a listener either gets the
    whole of them, parsed, or a text. `is_call` is for what stands behind <|python_tag|>."""

    def __init__(self, *, is_call: bool = False) -> None:
        self._is_call = is_call
        self._is_text = False
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece and returns what is to be shown."""
        if self._is_text:
            return text
        self._held += text
        if self._is_call:
            return ""
        found = [begins.fullmatch(self._held, partial=True) for begins in (JSON_CALL, PYTHON_CALL)]
        self._is_text = not any(found)
        self._is_call = any(match and not match.partial for match in found)
        return self.flush() if self._is_text else ""

    def flush(self) -> str:
        """What was held back, if it has turned out to be text."""
        rest, self._held = self._held, ""
        return rest


def _json_calls(text: str) -> list[Call]:
    """`{"name": "f", "parameters": {...}}`; several stand in a list or in a row."""
    calls, at = [], 0
    while at < len(text):
        value, at = json.JSONDecoder().raw_decode(text, at)
        calls += map(read_call, value if isinstance(value, list) else [value])
        at = next(re.compile(r"[;\s]*").finditer(text, at)).end()
    return calls


def _python_calls(text: str) -> list[Call]:
    """`[f(a="x", b=1), g()]`, read but never run."""
    require(PYTHON_CALL.match(text), "not a list of calls")
    with warnings.catch_warnings(action="ignore"):  # "\d" in a text is the model's affair
        tree = ast.parse(text, mode="eval").body
    calls = []
    for node in getattr(tree, "elts", ()):
        if not isinstance(node, ast.Call):
            raise ValueError("not all in the list are calls")
        name = ast.unparse(node.func)
        arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        require(not node.args and None not in arguments, "an argument has no name")
        require(name.replace(".", "").isidentifier(), f"{name!r:.60} is no name of a tool")
        calls.append(read_call({"name": name, "parameters": arguments}))
    return calls
