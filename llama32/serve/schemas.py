"""What may be asked of the server: the bodies of OpenAI's API, and what is added to it.

A parameter that is not listed is refused by name, as OpenAI does. Those under "taken and ignored"
change nothing there either, for one model on one machine.

What pydantic notes of a mistake takes a thousand times the memory that the mistake takes in a body.
Hence a list ends at its first one, and of all else there is a bounded number.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST = 4096  # messages, parts of one, choices
MOST_PAIRS = 1024
MOST_VALUES = 20_000  # in the schemas of all tools


def small(pairs: Any) -> Any:
    """A dict with few enough entries to look at each."""
    if isinstance(pairs, dict) and len(pairs) > MOST_PAIRS:
        raise PydanticCustomError("too_many", "at most {n} entries are taken", {"n": MOST_PAIRS})
    return pairs


T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
Some = Annotated[list[T], Field(fail_fast=True, min_length=1, max_length=MOST)]
Pairs = Annotated[dict[str, T], BeforeValidator(small)]
Text = Annotated[str, Field(min_length=1)]
Id = Annotated[int, Field(ge=0)]
TokenIds = Annotated[Many[Id], Field(min_length=1)]
Schema = dict[str, Any]


class Strict(BaseModel):
    """Nothing is converted (a number in quotes is none), and nothing is overlooked."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, given: Any) -> Any:
        """Of many names that are unknown the first is enough."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in given if name not in known)
        return {name: given[name] for name in (*known, unknown) if name in given}


class StreamOptions(Strict):
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # taken and ignored


class StructuredOutputs(Strict):
    """The form of an output, one of three. (as vLLM spells it; not OpenAI's)"""

    json_schema: Schema | None = Field(None, alias="json")
    regex: Annotated[Text, Field(max_length=2**16)] | None = None
    choice: Some[Text] | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if sum(form is not None for form in (self.json_schema, self.regex, self.choice)) != 1:
            raise ValueError("give one of json, regex and choice")
        return self


class Asked(Strict):
    """What both kinds of completion take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[Many[Text], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Pairs[Annotated[float, Field(ge=-100, le=100)]] | None = None

    # Not OpenAI's; named as vLLM does.
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 and 0: all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Annotated[Many[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    # Taken and ignored.
    user: str | None = None
    metadata: Pairs[str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class TextPart(Strict):
    """A piece of a message. There are no images for this model."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What a call calls."""

    name: Text
    arguments: str  # JSON


class ToolCall(Strict):
    """A call that the assistant has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of a dialog."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Some[TextPart] | None = None
    tool_calls: Annotated[Many[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    name: str | None = None  # taken and ignored: the model was not taught to tell names apart

    # In the answers of OpenAI's API, which are sent back as they came: nothing but null.
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None


class Function(Strict):
    """A tool, described."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # the model is held to the schema where it must call: `tool_choice`


class ToolSchema(Strict):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


def modest(tools: list[ToolSchema]) -> list[ToolSchema]:
    """Tools that fit a prompt. It has a line for each value, indented by its depth: what comes as a
    few MB could be as many GB there."""
    left: list[Any] = [tool.function.parameters for tool in tools]
    seen = 0
    while left and seen <= MOST_VALUES:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
            seen += len(value)
    if left:
        raise ValueError(f"tools: their schemas have more than {MOST_VALUES} values in all")
    return tools


Tools = Annotated[Many[ToolSchema], Field(max_length=128), AfterValidator(modest)]


class NamedFunction(Strict):
    """Which one."""

    name: Text


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A form of JSON, by name."""

    name: Text
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None  # what is finished is of this form either way


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON of a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self


class TemplateSettings(Strict):
    """What the chat template takes. (as vLLM spells it; not OpenAI's)"""

    date_string: Text | None = None  # "26 Jul 2024"; by default today
    tools_in_user_message: bool | None = None


class ChatBody(Asked):
    """POST /v1/chat/completions"""

    messages: Some[Message]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Many[Literal["text"]] | None = None
    chat_template_kwargs: TemplateSettings | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        forced = self.tool_choice not in (None, "none", "auto")
        if forced and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise ValueError(f"tool_choice: there is no tool {name!r:.60}")
        if len({*names}) < len(names):
            raise ValueError("tools: two of them have the same name")
        if self.structured_outputs and (forced or self.response_format):
            raise ValueError("structured_outputs stands alone: no response_format, no tool_choice")
        return self


class CompletionBody(Asked):
    """POST /v1/completions"""

    prompt: (
        str
        | TokenIds
        | Annotated[Some[str], Field(max_length=256)]
        | Annotated[Some[TokenIds], Field(max_length=256)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _fits(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: logprobs are not computed for the prompt; leave one of the two")
        return self

    @property
    def prompts(self) -> list[Any]:
        """Each a text or ids."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else [*self.prompt]


class TokenizeBody(Strict):
    """POST /tokenize: a text, or a dialog as the chat format writes it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Some[Message] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateSettings | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeBody(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: Many[Id]
