"""Parse tool calls in a model's output, in all forms that Llama 3 uses, without running any.

A message of tool calls is JSON, `{"name": "f", "parameters": {...}}`, one object, a list or objects
in a row; or a list of calls in Python syntax, `[f(x=1), g()]`. Any other message is text.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import regex

Call = tuple[str, dict[str, Any]]  # name of the tool, arguments
# Raised by json and ast. ast.parse raised SystemError once, in CPython 3.11 with several threads.
PARSE_ERRORS = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, SystemError)


# A message that begins like a tool call. Unfinished output is matched partially.
JSON_CALL = regex.compile(
    r'\s*\[?\s*\{\s*"(?:type|name|function|parameters|arguments)"\s*:.*', regex.DOTALL
)
PYTHON_CALL = regex.compile(r"\s*\[\s*[^\W\d][\w.]*\(.*", regex.DOTALL)


def require(ok: object, problem: str) -> None:
    """Raise ValueError with the problem unless `ok`."""
    if not ok:
        raise ValueError(problem)


def json_copy(place: str, value: Any) -> Any:
    """Return a copy of `value` through JSON, or raise ValueError if JSON cannot represent it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except PARSE_ERRORS as error:
        raise ValueError(f"{place}: not valid in JSON: {error}") from None


def parse_call(value: Any) -> Call:
    """Return a call in OpenAI's form or a model's, with arguments as a dict or as JSON text.

    Raises ValueError, or another of PARSE_ERRORS, for any other value.
    """
    function = value.get("function", value) if isinstance(value, Mapping) else value
    require(isinstance(function, Mapping), "a call must be an object")
    has_keys = function.keys() - {"type"} in ({"name", "arguments"}, {"name", "parameters"})
    require(has_keys, "a call must have a name and parameters, and nothing else")
    require(function.get("type", "function") == "function", "the type of a call must be function")
    name, arguments = function["name"], function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    require(name and isinstance(name, str), "the name of a call must be a text")
    require(isinstance(arguments, dict), "the parameters of a call must be an object")
    return name, json_copy("arguments", arguments)


def parse_calls(text: str) -> tuple[list[Call], str | None]:
    """Return the tool calls of a text, and the problem if only the beginning looks like a call.

    Text that is not made of calls alone gives an empty list.
    """
    problem = None
    for pattern, parse in ((JSON_CALL, _json_calls), (PYTHON_CALL, _python_calls)):
        try:
            return parse(text.strip()), None
        except PARSE_ERRORS as error:
            if pattern.match(text):
                problem = f"begins like a tool call, but cannot be parsed: {error}"
    return [], problem


class ToolCallBuffer:
    """A filter for streamed text that holds back possible tool calls.

    A subscriber gets either text or complete, parsed calls. `is_call` is set for text behind
    <|python_tag|>, which is always a call.
    """

    def __init__(self, *, is_call: bool = False) -> None:
        self._is_call = is_call
        self._is_text = False
        self._held = ""

    def push(self, text: str) -> str:
        """Add the next piece and return the text to show."""
        if self._is_text:
            return text
        self._held += text
        if self._is_call:
            return ""
        patterns = (JSON_CALL, PYTHON_CALL)
        matches = [pattern.fullmatch(self._held, partial=True) for pattern in patterns]
        self._is_text = not any(matches)
        self._is_call = any(match and not match.partial for match in matches)
        return self.flush() if self._is_text else ""

    def flush(self) -> str:
        """Return the held text, once the model has finished or no call can follow."""
        rest, self._held = self._held, ""
        return rest


def _json_calls(text: str) -> list[Call]:
    """Parse `{"name": "f", "parameters": {...}}`, several in a list or in a row."""
    calls, start = [], 0
    while start < len(text):
        value, end = json.JSONDecoder().raw_decode(text, start)
        calls += map(parse_call, value if isinstance(value, list) else [value])
        start = next(re.compile(r"[;\s]*").finditer(text, end)).end()
    return calls


def _python_calls(text: str) -> list[Call]:
    """Parse `[f(a="x", b=1), g()]` without running the calls."""
    require(PYTHON_CALL.match(text), "not a list of calls")
    with warnings.catch_warnings(action="ignore"):  # no warning for "\d" in a model's text
        tree = ast.parse(text, mode="eval").body
    calls = []
    for node in getattr(tree, "elts", ()):
        if not isinstance(node, ast.Call):
            raise ValueError("a list of calls holds something else")
        name = ast.unparse(node.func)
        arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        require(not node.args and None not in arguments, "an argument has no name")
        require(name.replace(".", "").isidentifier(), f"{name!r:.60} is not a tool name")
        calls.append(parse_call({"name": name, "parameters": arguments}))
    return calls
