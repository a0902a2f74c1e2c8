"""Request bodies: OpenAI's parameters and llama32's additions.

The server rejects an unknown parameter by name, as OpenAI does. Parameters under "Ignored" are
accepted and have no effect, because the server has a single model.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llama32.serve.message_schemas import Message, NamedToolChoice, TemplateSettings, Tools
from llama32.serve.schema_base import (
    BoundedDict,
    FailFastList,
    NonEmptyList,
    NonEmptyText,
    Schema,
    StrictModel,
    TokenId,
    TokenIds,
)


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored


class StructuredOutputs(StrictModel):
    """A grammar for the output, of three kinds (not OpenAI's; names as in vLLM)."""

    json_schema: Schema | None = Field(None, alias="json")
    regex: Annotated[NonEmptyText, Field(max_length=2**16)] | None = None
    choice: NonEmptyList[NonEmptyText] | None = None

    @model_validator(mode="after")
    def _check_one_kind(self) -> "StructuredOutputs":
        kinds = (self.json_schema, self.regex, self.choice)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("structured_outputs: give exactly one of json, regex and choice")
        return self


class JsonSchema(StrictModel):
    """A named JSON schema for the answer."""

    name: NonEmptyText
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None  # ignored: finished output always follows the schema


class ResponseFormat(StrictModel):
    """Format of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self


class SamplingBody(StrictModel):
    """Parameters common to chats and completions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: NonEmptyText | Annotated[FailFastList[NonEmptyText], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: BoundedDict[Annotated[float, Field(ge=-100, le=100)]] | None = None

    # Not OpenAI's; names as in vLLM.
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 and 0: all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Annotated[FailFastList[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    # Ignored.
    user: str | None = None
    metadata: BoundedDict[str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: NonEmptyList[Message]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: FailFastList[Literal["text"]] | None = None
    chat_template_kwargs: TemplateSettings | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        forced = self.tool_choice not in (None, "none", "auto")
        if forced and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            if name not in names:
                raise ValueError(f"tool_choice: there is no tool {name!r:.60}")
        if len({*names}) < len(names):
            raise ValueError("tools: two tools have the same name; rename one")
        if self.structured_outputs and (forced or self.response_format):
            raise ValueError(
                "structured_outputs excludes response_format and a forced tool_choice; choose one"
            )
        return self


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[NonEmptyList[str], Field(max_length=256)]
        | Annotated[NonEmptyList[TokenIds], Field(max_length=256)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_combinations(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: prompt tokens have no logprobs; leave out echo or logprobs")
        return self

    @property
    def prompts(self) -> list[Any]:
        """All prompts: texts or lists of token ids."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else [*self.prompt]


class TokenizeBody(StrictModel):
    """Body of POST /tokenize: a text, or a dialog to render in the chat format."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: NonEmptyList[Message] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateSettings | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: FailFastList[TokenId]
