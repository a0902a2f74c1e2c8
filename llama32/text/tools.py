"""Python functions as tools: schemas for the model, and running the model's calls.

pydantic turns a signature into a JSON schema. The first paragraph of the docstring is the
description, and lines `name: description` under "Args:" describe the parameters. Arguments are
checked against the schema before a function is called.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

Schema = Mapping[str, Any]  # a tool in the form of OpenAI's API
NAMED_KINDS = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


class Tool:
    """A function that a model may call.

    Raises ValueError if a parameter is positional-only, `*args` or `**kwargs`, or if a type has no
    JSON form.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in NAMED_KINDS:
                raise ValueError(f"tools: {self.name} takes {parameter}; give each a name")
        description, parameter_texts = parse_docstring(inspect.getdoc(function) or "")
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(function)  # pyright: ignore
            parameters = drop_titles(self._adapter.json_schema())
        except PydanticUserError as error:
            raise ValueError(f"tools: {self.name}: {error.message}") from None
        for name, schema in parameters["properties"].items():
            if name in parameter_texts:
                schema.setdefault("description", parameter_texts[name])
        definition = {"name": self.name, "description": description, "parameters": parameters}
        self.schema: Schema = {"type": "function", "function": definition}

    def run(self, arguments: Mapping[str, Any]) -> str:
        """Return the result as text, or the error as JSON for the model to correct the call."""
        try:
            return to_text(self._adapter.validate_python(ArgsKwargs((), dict(arguments))))
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors]
            return to_text({"error": "; ".join(problems)})
        except Exception as error:
            return to_text({"error": f"{type(error).__name__}: {error}"})


class Tools:
    """The tools of a dialog: functions, and schemas without a function to run."""

    def __init__(self, functions_or_schemas: Sequence[Schema | Callable[..., Any]]) -> None:
        tools = [Tool(tool) if callable(tool) else tool for tool in functions_or_schemas]
        self.schemas = [tool.schema if isinstance(tool, Tool) else tool for tool in tools]
        self.functions = {tool.name: tool for tool in tools if isinstance(tool, Tool)}

    def can_run(self, message: Mapping[str, Any]) -> bool:
        """True if a message calls tools, and no tool without a function."""
        names = {schema.get("function", schema).get("name") for schema in self.schemas}
        called = {call["function"]["name"] for call in message["tool_calls"]}
        return bool(called) and not called & (names - self.functions.keys())

    def run_calls(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run all calls; return a message for each call, followed by the result.

        The Hub's format has one call a message, hence the split.
        """
        dialog: list[dict[str, Any]] = []
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name in self.functions:
                result = self.functions[name].run(arguments)
            else:
                result = to_text({"error": f"no tool {name!r}, only {', '.join(self.functions)}"})
            dialog.append({**message, "tool_calls": [call]})
            dialog.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return dialog


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the first paragraph, and the text behind each name under "Args:"."""
    description = docstring.partition("\n\n")[0].replace("\n", " ").strip()
    section = re.search(r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+.*\n?|\n)*)", docstring, re.M)
    if section is None:
        return description, {}
    lines = inspect.cleandoc(section[1])
    entries = re.findall(r"^(\w+)(?: *\([^)\n]*\))?: *(.*(?:\n[ \t]+.*)*)", lines, re.M)
    return description, {name: " ".join(text.split()) for name, text in entries}


def drop_titles(schema: Any) -> Any:
    """Return a schema without the titles that pydantic makes from names: useless to a model."""
    if isinstance(schema, list):
        return [drop_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: drop_titles(member) for name, member in value.items()}
        if key in ("properties", "$defs")
        else drop_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def to_text(result: Any) -> str:
    """Return text unchanged, and anything else as JSON."""
    is_text = isinstance(result, str)
    return result if is_text else json.dumps(result, ensure_ascii=False, default=str)
