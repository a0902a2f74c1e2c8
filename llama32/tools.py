"""Python functions as tools: what a model is told of them, and how its calls are run.

A signature becomes a JSON schema, by pydantic, and so does what the docstring says: its first
paragraph is the description, and lines `name: what it is` under "Args:" describe the parameters.
Arguments are checked against the schema before anything is called.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

Schema = Mapping[str, Any]  # of a tool, as OpenAI's API has it


BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


class Tool:
    """A function that a model may call. ValueError where its parameters cannot be given by name, or
    are of types that JSON lacks."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in BY_NAME:
                raise ValueError(f"tools: {self.name} takes {parameter}; give each a name")
        about, lines = described(inspect.getdoc(function) or "")
        try:
            self._checked: TypeAdapter[Any] = TypeAdapter(function)  # pyright: ignore
            parameters = without_titles(self._checked.json_schema())
        except PydanticUserError as error:
            raise ValueError(f"tools: {self.name}: {error.message}") from None
        for name, its in parameters["properties"].items():
            if name in lines:
                its.setdefault("description", lines[name])
        described_function = {"name": self.name, "description": about, "parameters": parameters}
        self.schema: Schema = {"type": "function", "function": described_function}

    def run(self, arguments: Mapping[str, Any]) -> str:
        """What it answers, as text; also what it raises, for the model to see and mend."""
        try:
            return as_text(self._checked.validate_python(ArgsKwargs((), dict(arguments))))
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems]
            return as_text({"error": "; ".join(wrong)})
        except Exception as error:
            return as_text({"error": f"{type(error).__name__}: {error}"})


class Tools:
    """Those of a dialog: functions, which can be run, and bare schemas, which cannot."""

    def __init__(self, given: Sequence[Schema | Callable[..., Any]]) -> None:
        made = [Tool(one) if callable(one) else one for one in given]
        self.schemas = [one.schema if isinstance(one, Tool) else one for one in made]
        self.known = {one.name: one for one in made if isinstance(one, Tool)}

    def can_run(self, message: Mapping[str, Any]) -> bool:
        """Whether a message calls tools, and none that is known by its schema alone."""
        named = {one.get("function", one).get("name") for one in self.schemas}
        called = {call["function"]["name"] for call in message["tool_calls"]}
        return bool(called) and not called & (named - self.known.keys())

    def answers(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The message and what its calls gave. Each call stands in a message of its own, before its
        answer, since the Hub's format has room for one."""
        dialog: list[dict[str, Any]] = []
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name in self.known:
                answer = self.known[name].run(arguments)
            else:
                answer = as_text({"error": f"no tool {name!r}, only {', '.join(self.known)}"})
            dialog.append({**message, "tool_calls": [call]})
            dialog.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
        return dialog


def described(docstring: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and what stands behind each name under "Args:"."""
    about = docstring.partition("\n\n")[0].replace("\n", " ").strip()
    listed = re.search(r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+.*\n?|\n)*)", docstring, re.M)
    if listed is None:
        return about, {}
    block = inspect.cleandoc(listed[1])
    found = re.findall(r"^(\w+)(?: *\([^)\n]*\))?: *(.*(?:\n[ \t]+.*)*)", block, re.M)
    return about, {name: " ".join(text.split()) for name, text in found}


def without_titles(schema: Any) -> Any:
    """Less the titles that pydantic makes of names: they tell a model nothing."""
    if isinstance(schema, list):
        return [without_titles(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: without_titles(its) for name, its in value.items()}
        if key in ("properties", "$defs")
        else without_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def as_text(answer: Any) -> str:
    """Text as it is, all else as JSON."""
    return (
        answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
    )
