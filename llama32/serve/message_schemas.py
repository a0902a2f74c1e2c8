"""Schemas of the messages and tools in chat requests."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from llama32.serve.schema_base import (
    FailFastList,
    NonEmptyList,
    NonEmptyText,
    Schema,
    StrictModel,
)

MAX_SCHEMA_VALUES = 20_000  # in the schemas of all tools together


class TextPart(StrictModel):
    """Text in a message. The model reads no images."""

    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    """Name and arguments of a tool call."""

    name: NonEmptyText
    arguments: str  # JSON


class ToolCall(StrictModel):
    """A tool call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(StrictModel):
    """A message of a dialog."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | NonEmptyList[TextPart] | None = None
    tool_calls: Annotated[FailFastList[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    name: str | None = None  # ignored: the chat format has no names

    # OpenAI's responses contain these fields and clients send them back: only empty values pass.
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None


class FunctionDefinition(StrictModel):
    """Name, description and parameters of a tool."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = (
        None  # ignored: a call that `tool_choice` forces always follows the schema
    )


class ToolSchema(StrictModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


def check_tool_sizes(tools: list[ToolSchema]) -> list[ToolSchema]:
    """Reject schemas that would make the prompt huge.

    The prompt has a line for each value, indented by its depth, so a few MB of JSON could become
    as many GB of prompt.
    """
    pending: list[Any] = [tool.function.parameters for tool in tools]
    num_values = 0
    while pending and num_values <= MAX_SCHEMA_VALUES:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
            num_values += len(value)
    if pending:
        raise ValueError(
            f"tools: the schemas have more than {MAX_SCHEMA_VALUES} values in all; send less"
        )
    return tools


Tools = Annotated[FailFastList[ToolSchema], Field(max_length=128), AfterValidator(check_tool_sizes)]


class FunctionName(StrictModel):
    """The name of a tool."""

    name: NonEmptyText


class NamedToolChoice(StrictModel):
    """A `tool_choice` for a named tool, to force a call."""

    type: Literal["function"]
    function: FunctionName


class TemplateSettings(StrictModel):
    """Settings of the chat template (not OpenAI's; names as in vLLM)."""

    date_string: NonEmptyText | None = None  # "26 Jul 2024"; default: today
    tools_in_user_message: bool | None = None
