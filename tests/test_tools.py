"""Python functions as tools: what a model is told of them, and what comes of its calls."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from llama32.tools import Tool, Tools, described


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


def test_types_may_be_what_json_has_a_form_for():
    def plan(trip: Trip, color: Color, title: Annotated[str, Field(description="Its name")]) -> str:
        assert isinstance(trip.places[0], Place)
        return f"{trip.places[0].city} {color.value} {title}"

    parameters = Tool(plan).schema["function"]["parameters"]
    assert parameters["properties"]["title"] == {"type": "string", "description": "Its name"}
    assert parameters["$defs"]["Place"]["properties"]["zip"]["anyOf"][0] == {"type": "integer"}
    assert parameters["$defs"]["Color"] == {"type": "string", "enum": ["red", "blue"]}
    given = {"trip": {"places": [{"city": "Rome"}]}, "color": "red", "title": "x"}
    assert Tool(plan).run(given) == "Rome red x"


def test_a_function_without_a_word_is_a_tool_too():
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


def test_what_cannot_be_described_is_refused():
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
def test_wrong_arguments_are_told_to_the_model_and_nothing_is_called(arguments, error):
    assert json.loads(Tool(weather).run(arguments)) == {"error": error}


def test_what_a_function_raises_is_told_to_the_model():
    def divide(a: float, b: float) -> float:
        return a / b

    assert Tool(divide).run({"a": 1, "b": 4}) == "0.25"
    said = json.loads(Tool(divide).run({"a": 1, "b": 0}))
    assert said == {"error": "ZeroDivisionError: float division by zero"}


def test_ctrl_c_in_a_tool_is_no_answer():
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tool(stop).run({})


@pytest.mark.parametrize("heading", ["Args", "Arguments", "Parameters"])
def test_parameters_are_described_below_a_heading(heading):
    text = (
        f"Do it.\n\n{heading}:\n    a: one\n    b (int): two\n        more\n\nReturns:\n    c: no"
    )
    assert described(text) == ("Do it.", {"a": "one", "b": "two more"})
    assert described("Do it.\nNow.") == ("Do it. Now.", {})


def message(*names: str) -> dict[str, Any]:
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": {}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_each_call_is_answered_behind_a_message_of_its_own():
    def one() -> str:
        return "1"

    tools = Tools([one])
    said = message("one", "two")
    first, answer, second, refused = tools.answers(said)
    assert [first["tool_calls"], second["tool_calls"]] == [[call] for call in said["tool_calls"]]
    assert answer == {"role": "tool", "tool_call_id": "call_0", "content": "1"}
    assert json.loads(refused["content"]) == {"error": "no tool 'two', only one"}


def test_what_is_known_by_its_schema_alone_is_for_the_caller_to_run():
    def one() -> str:
        return "1"

    schema = {"type": "function", "function": {"name": "two", "parameters": {}}}
    tools = Tools([one, schema])
    assert [tool["function"]["name"] for tool in tools.schemas] == ["one", "two"]
    assert tools.can_run(message("one"))
    assert tools.can_run(message("one", "unknown"))
    assert not tools.can_run(message("one", "two"))
    assert not tools.can_run(message())
