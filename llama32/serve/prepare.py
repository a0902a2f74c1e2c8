"""Request bodies converted for the engine: token ids, sampling settings, a grammar."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama32.llm.llm import LLM
from llama32.llm.prompt import PreparedPrompt
from llama32.sampling import derive_seed
from llama32.sampling_params import Grammar, Sampling
from llama32.serve.errors import ApiError
from llama32.serve.message_schemas import Message, NamedToolChoice, TemplateSettings, ToolSchema
from llama32.serve.schema_base import Schema
from llama32.serve.schemas import ChatBody, CompletionBody, SamplingBody, StructuredOutputs
from llama32.text.chat import Chat

# Fields with the same name in `SamplingBody` and `Sampling`.
SAMPLING_FIELDS = (
    "temperature top_k top_p min_p seed stop ignore_eos logit_bias "
    "presence_penalty frequency_penalty repetition_penalty"
).split()


def prepare_chat(llm: LLM, body: ChatBody, max_length: int) -> list[PreparedPrompt]:
    """Prepare a chat: the same prompt for each of the `n` answers.

    `max_length` is the maximum number of tokens of a request, prompt and answer together.
    """
    chat = llm.require_chat()
    ids = dialog_ids(chat, body.messages, offered_tools(body), body.chat_template_kwargs)
    sampling = sampling_settings(
        llm,
        body,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or max_length,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=answer_grammar(body),
    )
    prepared = prepare_choices(llm, body, ids, sampling, max_length, chat)
    if offered_tools(body):
        return prepared
    # Without tools, output that looks like a call is text.
    return [replace(prompt, chat=None) for prompt in prepared]


def prepare_completion(llm: LLM, body: CompletionBody, max_length: int) -> list[PreparedPrompt]:
    """Prepare completions: each prompt `n` times, prompt by prompt."""
    sampling = sampling_settings(
        llm,
        body,
        max_new_tokens=body.max_tokens or 16,  # OpenAI's default
        logprobs=body.logprobs,
        grammar=structured_grammar(body.structured_outputs),
    )
    prepared: list[PreparedPrompt] = []
    for prompt in body.prompts:
        prepared += prepare_choices(llm, body, llm.encode(prompt), sampling, max_length)
    return prepared


def offered_tools(body: ChatBody) -> list[ToolSchema]:
    """Return the tools that the prompt describes and the model may call."""
    return [] if body.tool_choice == "none" else body.tools or []


def sampling_settings(llm: LLM, body: SamplingBody, **settings: Any) -> Sampling:
    """Return the body's sampling settings on top of the checkpoint's defaults."""
    settings |= {name: getattr(body, name) for name in SAMPLING_FIELDS}
    settings["stop_ids"] = body.stop_token_ids
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.get("top_k", 1) < 1:
        settings["top_k"] = None
    if settings.get("top_p") == 0:
        settings["top_p"] = 2.0**-40  # only the most likely token
    try:
        bias = settings.pop("logit_bias", {})
        settings["logit_bias"] = {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ApiError(400, "logit_bias: keys must be token ids", param="logit_bias") from None
    return replace(llm.defaults, **settings)


def prepare_choices(
    llm: LLM,
    body: SamplingBody,
    ids: list[int],
    sampling: Sampling,
    max_length: int,
    chat: Chat | None = None,
) -> list[PreparedPrompt]:
    """Prepare a prompt `n` times, with a different seed each time.

    Limits the answer to the tokens that the prompt leaves of `max_length`; raises ApiError if the
    prompt leaves none.
    """
    max_new_tokens = max_length - len(ids)
    if max_new_tokens < 1:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens; prompt and answer together may come to "
            f"{max_length}; shorten the prompt",
            code="context_length_exceeded",
        )
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, max_new_tokens))
    prepared = []
    for i in range(body.n or 1):
        seed = None if sampling.seed is None else derive_seed(sampling.seed, i)
        prepared.append(llm.prepare(ids, replace(sampling, seed=seed), chat))
    return prepared


def dialog_ids(
    chat: Chat,
    messages: Sequence[Message],
    tools: Sequence[ToolSchema] | None,
    template: TemplateSettings | None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Encode a dialog with the model's chat format."""
    template = template or TemplateSettings()
    options = {}
    if template.tools_in_user_message is not None:
        if chat.style != "hub":
            raise ApiError(400, "tools_in_user_message: this model's chat format has no tools")
        options["tools_in_user_message"] = template.tools_in_user_message
    return chat.encode(
        split_tool_calls([message.model_dump(exclude_none=True) for message in messages]),
        tools=[tool.model_dump(exclude_none=True) for tool in tools or ()],
        date=template.date_string,
        add_generation_prompt=add_generation_prompt,
        **options,
    )


def split_tool_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the dialog with a single tool call per message, followed by the tool's answer.

    The chat format allows a single call per message; OpenAI's API has all calls in the same
    message and the answers after all calls.
    """
    dialog: list[dict[str, Any]] = []
    answers = {m["tool_call_id"]: m for m in messages if m.get("tool_call_id") is not None}
    moved: set[str] = set()
    for message in messages:
        if message["role"] == "developer":  # OpenAI's newer name for "system"
            message = {**message, "role": "system"}
        calls = message.get("tool_calls", ())
        if message.get("tool_call_id") in moved:
            continue
        if len(calls) < 2:
            dialog.append(message)
            continue
        for call in calls:
            dialog.append({**message, "tool_calls": [call]})
            message = {**message, "content": None}  # the text stands before the first call
            if call["id"] in answers and call["id"] not in moved:
                dialog.append(answers[call["id"]])
                moved.add(call["id"])
    return dialog


def answer_grammar(body: ChatBody) -> Grammar | None:
    """Return the grammar of the answer, if the request constrains the answer.

    A forced `tool_choice` demands a call. A `response_format` demands JSON of the schema or, with
    tools, a call.
    """
    tools = offered_tools(body)
    if isinstance(body.tool_choice, NamedToolChoice):
        name = body.tool_choice.function.name
        return any_of_grammar(call_schemas([tool for tool in tools if tool.function.name == name]))
    if body.tool_choice == "required":
        return any_of_grammar(call_schemas(tools))
    if body.response_format is None or body.response_format.type == "text":
        return structured_grammar(body.structured_outputs)
    json_schema = body.response_format.json_schema
    answer_schema = (json_schema and json_schema.schema_) or {"type": "object"}
    return any_of_grammar([answer_schema, *call_schemas(tools)])


NO_PARAMETERS: Schema = {"type": "object", "additionalProperties": False}


def call_schemas(tools: Sequence[ToolSchema]) -> list[Schema]:
    """Return a schema for a call of each tool, in the JSON that the model was trained to write."""
    return [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": with_schema_id(tool.function.parameters or NO_PARAMETERS, i),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]


def any_of_grammar(schemas: Sequence[Schema]) -> Grammar:
    """Return a grammar for JSON of any of the schemas."""
    if len(schemas) == 1:
        return Grammar.json(schemas[0])
    branches = [with_schema_id(schema, f"form-{i}") for i, schema in enumerate(schemas)]
    return Grammar.json({"anyOf": branches})


def with_schema_id(schema: Schema, name: object) -> Schema:
    """Give a schema an id, so that references (`#/$defs/...`) work inside another schema."""
    return {"$id": f"urn:llama32:{name}", **schema}


def structured_grammar(outputs: StructuredOutputs | None) -> Grammar | None:
    """Return the grammar of `structured_outputs`, or None."""
    if outputs is None:
        return None
    if outputs.regex is not None:
        return Grammar.regex(outputs.regex)
    if outputs.choice is not None:
        return Grammar.choice(outputs.choice)
    return Grammar.json(outputs.json_schema or True)
