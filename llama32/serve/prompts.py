"""What a client asks, as what the engine is asked: ids, settings, a grammar."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama32.chat import Chat, hub
from llama32.llm import LLM, Prepared
from llama32.sampling import derive_seed
from llama32.serve.errors import ApiError
from llama32.serve.schemas import (
    Asked,
    ChatBody,
    CompletionBody,
    Message,
    NamedTool,
    Schema,
    StructuredOutputs,
    TemplateSettings,
    ToolSchema,
)
from llama32.settings import Grammar, Sampling

# What `Sampling` calls by the same name.
ALIKE = (
    "temperature top_k top_p min_p seed stop ignore_eos logit_bias "
    "presence_penalty frequency_penalty repetition_penalty"
).split()


def prepare_chat(llm: LLM, body: ChatBody, capacity: int) -> list[Prepared]:
    """One for each answer that is wanted. No request may have more tokens than `capacity`."""
    chat = llm.require_chat()
    ids = dialog_ids(chat, body.messages, offered(body), body.chat_template_kwargs)
    sampling = settings(
        llm,
        body,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or capacity,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=answer_form(body),
    )
    prepared = several(llm, body, ids, sampling, capacity, chat)
    if offered(body):
        return prepared
    return [replace(one, chat=None) for one in prepared]  # what looks like a call is a text


def prepare_completion(llm: LLM, body: CompletionBody, capacity: int) -> list[Prepared]:
    """For each prompt, one for each text that is wanted."""
    sampling = settings(
        llm,
        body,
        max_new_tokens=body.max_tokens or 16,  # OpenAI's default
        logprobs=body.logprobs,
        grammar=structured(body.structured_outputs),
    )
    prepared: list[Prepared] = []
    for prompt in body.prompts:
        prepared += several(llm, body, llm.encode(prompt), sampling, capacity)
    return prepared


def offered(body: ChatBody) -> list[ToolSchema]:
    """The tools that the model is told of, and may call."""
    return [] if body.tool_choice == "none" else body.tools or []


def settings(llm: LLM, body: Asked, **more: Any) -> Sampling:
    """What is not asked for is as the checkpoint says."""
    asked = {name: getattr(body, name) for name in ALIKE} | {"stop_ids": body.stop_token_ids}
    given: dict[str, Any] = {k: v for k, v in (asked | more).items() if v is not None}
    if given.get("top_k", 1) < 1:
        given["top_k"] = None
    if given.get("top_p") == 0:
        given["top_p"] = 2.0**-40  # the likeliest alone
    try:
        bias = given.pop("logit_bias", {})
        given["logit_bias"] = {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ApiError(400, "logit_bias: its keys are token ids", param="logit_bias") from None
    return replace(llm.defaults, **given)


def several(
    llm: LLM,
    body: Asked,
    ids: list[int],
    sampling: Sampling,
    capacity: int,
    chat: Chat | None = None,
) -> list[Prepared]:
    """The same prompt `n` times, each with a seed of its own, and no longer than there is room."""
    room = capacity - len(ids)
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, and with its answer it may come to {capacity}",
            code="context_length_exceeded",
        )
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
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
    """The dialog as the chat format writes it."""
    template = template or TemplateSettings()
    options = {}
    if template.tools_in_user_message is not None:
        if chat.render is not hub:
            raise ApiError(400, "tools_in_user_message: this model's chat format has no tools")
        options["tools_in_user_message"] = template.tools_in_user_message
    return chat.encode(
        one_call_each([message.model_dump(exclude_none=True) for message in messages]),
        tools=[tool.model_dump(exclude_none=True) for tool in tools or ()],
        date=template.date_string,
        add_generation_prompt=add_generation_prompt,
        **options,
    )


def one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dialog with a message for each call, and its answer behind it: the format has room for
    one, and OpenAI's has the calls in one message and the answers in a row."""
    dialog: list[dict[str, Any]] = []
    answers = {m["tool_call_id"]: m for m in messages if m.get("tool_call_id") is not None}
    moved: set[str] = set()
    for message in messages:
        if message["role"] == "developer":  # a newer name of the same
            message = {**message, "role": "system"}
        calls = message.get("tool_calls", ())
        if message.get("tool_call_id") in moved:
            continue
        if len(calls) < 2:
            dialog.append(message)
            continue
        for call in calls:
            dialog.append({**message, "tool_calls": [call]})
            message = {**message, "content": None}  # it was said before the first
            if call["id"] in answers and call["id"] not in moved:
                dialog.append(answers[call["id"]])
                moved.add(call["id"])
    return dialog


def answer_form(body: ChatBody) -> Grammar | None:
    """What the answer has to look like: a call where one is demanded, or as `response_format`
    says, or either where the model may choose."""
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        return any_of(call_forms([tool for tool in offered(body) if tool.function.name == name]))
    if body.tool_choice == "required":
        return any_of(call_forms(offered(body)))
    if body.response_format is None or body.response_format.type == "text":
        return structured(body.structured_outputs)
    wanted = body.response_format.json_schema
    form = (wanted and wanted.schema_) or {"type": "object"}
    return any_of([form, *call_forms(offered(body))])


NOTHING: Schema = {"type": "object", "additionalProperties": False}


def call_forms(tools: Sequence[ToolSchema]) -> list[Schema]:
    """What a call of each looks like, as the model was taught to write it."""
    return [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": rooted(tool.function.parameters or NOTHING, i),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]


def any_of(forms: Sequence[Schema]) -> Grammar:
    """JSON of one of these."""
    if len(forms) == 1:
        return Grammar.json(forms[0])
    return Grammar.json({"anyOf": [rooted(form, f"form-{i}") for i, form in enumerate(forms)]})


def rooted(schema: Schema, name: object) -> Schema:
    """A schema whose references (`#/$defs/...`) still mean itself when it stands in another."""
    return {"$id": f"urn:llama32:{name}", **schema}


def structured(asked: StructuredOutputs | None) -> Grammar | None:
    """The grammar, if there is to be one."""
    if asked is None:
        return None
    if asked.regex is not None:
        return Grammar.regex(asked.regex)
    if asked.choice is not None:
        return Grammar.choice(asked.choice)
    return Grammar.json(asked.json_schema or True)
