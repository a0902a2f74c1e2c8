"""Python functions as tools: schemas, and running calls."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from llama32.text.tools import Tool, Tools, parse_docstring


class Color(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Place:
    city: str
    zip: int | None = None


class Trip(BaseModel):
    places: list[Place]


def weather(city: str, unit: Literal["C", "F"] = "C", *, days: int = 1) -> dict[str, Any]:
    """The weather in a city,
    today or later.

    More that a model need not know.

    Args:
        city: Which one,
            as in "Rome".
        unit (str): Of the temperature.
    """
    return {"city": city, "unit": unit, "days": days}


def test_signature_and_docstring_become_the_schema():
    assert Tool(weather).schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city, today or later.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": 'Which one, as in "Rome".'},
                    "unit": {
                        "type": "string",
                        "enum": ["C", "F"],
                        "default": "C",
                        "description": "Of the temperature.",
                    },
                    "days": {"type": "integer", "default": 1},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_types_with_a_json_form_are_allowed():
    def plan(trip: Trip, color: Color, title: Annotated[str, Field(description="Its name")]) -> str:
        assert isinstance(trip.places[0], Place)
        return f"{trip.places[0].city} {color.value} {title}"

    parameters = Tool(plan).schema["function"]["parameters"]
    assert parameters["properties"]["title"] == {"type": "string", "description": "Its name"}
    assert parameters["$defs"]["Place"]["properties"]["zip"]["anyOf"][0] == {"type": "integer"}
    assert parameters["$defs"]["Color"] == {"type": "string", "enum": ["red", "blue"]}
    arguments = {"trip": {"places": [{"city": "Rome"}]}, "color": "red", "title": "x"}
    assert Tool(plan).run(arguments) == "Rome red x"


def test_a_function_without_a_docstring_is_a_tool():
    def now():
        return 5

    function = Tool(now).schema["function"]
    assert function["description"] == ""
    assert function["parameters"]["properties"] == {}
    assert Tool(now).run({}) == "5"


@pytest.mark.parametrize("title", ["title", "json", "self_", "schema", "model_name"])
def test_a_parameter_may_be_called_anything(title):
    space: dict[str, Any] = {}
    exec(f"def f({title}: str) -> str:\n    return {title} * 2", space)
    assert [*Tool(space["f"]).schema["function"]["parameters"]["properties"]] == [title]
    assert Tool(space["f"]).run({title: "a"}) == "aa"


def test_functions_without_a_schema_are_refused():
    def several(*names: str) -> None: ...
    def others(**names: str) -> None: ...
    def odd(x: Callable[[], int]) -> None: ...

    for function in (several, others):
        with pytest.raises(ValueError, match=r"tools: \w+ takes \*+names: str; give each a name"):
            Tool(function)
    with pytest.raises(ValueError, match="tools: odd: Cannot generate a JsonSchema"):
        Tool(odd)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "city: Missing required argument"),
        ({"city": 5}, "city: Input should be a valid string"),
        ({"city": "Rome", "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        ({"city": "Rome", "when": 1}, "when: Unexpected keyword argument"),
    ],
)
def test_wrong_arguments_are_reported_to_the_model_without_a_call(arguments, error):
    assert json.loads(Tool(weather).run(arguments)) == {"error": error}


def test_an_exception_is_reported_to_the_model():
    def divide(a: float, b: float) -> float:
        return a / b

    assert Tool(divide).run({"a": 1, "b": 4}) == "0.25"
    result = json.loads(Tool(divide).run({"a": 1, "b": 0}))
    assert result == {"error": "ZeroDivisionError: float division by zero"}


def test_ctrl_c_in_a_tool_is_raised():
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tool(stop).run({})


@pytest.mark.parametrize("heading", ["Args", "Arguments", "Parameters"])
def test_parameters_are_described_below_a_heading(heading):
    text = (
        f"Do it.\n\n{heading}:\n    a: one\n    b (int): two\n        more\n\nReturns:\n    c: no"
    )
    assert parse_docstring(text) == ("Do it.", {"a": "one", "b": "two more"})
    assert parse_docstring("Do it.\nNow.") == ("Do it. Now.", {})


def message(*names: str) -> dict[str, Any]:
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": {}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_each_call_gets_its_own_message_and_result():
    def one() -> str:
        return "1"

    tools = Tools([one])
    both = message("one", "two")
    first, answer, second, refused = tools.run_calls(both)
    assert [first["tool_calls"], second["tool_calls"]] == [[call] for call in both["tool_calls"]]
    assert answer == {"role": "tool", "tool_call_id": "call_0", "content": "1"}
    assert json.loads(refused["content"]) == {"error": "no tool 'two', only one"}


def test_a_tool_without_a_function_is_not_run():
    def one() -> str:
        return "1"

    schema = {"type": "function", "function": {"name": "two", "parameters": {}}}
    tools = Tools([one, schema])
    assert [tool["function"]["name"] for tool in tools.schemas] == ["one", "two"]
    assert tools.can_run(message("one"))
    assert tools.can_run(message("one", "unknown"))
    assert not tools.can_run(message("one", "two"))
    assert not tools.can_run(message())
