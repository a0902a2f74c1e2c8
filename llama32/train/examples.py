"""Records of a training file become examples: token ids and a loss mask.

A record is a dialog, in the format of OpenAI's fine-tuning files, where the assistant's tokens are
learned; a prompt with a completion, where the completion is learned; or a text, learned whole:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"prompt": "Once upon", "completion": " a time"}
    {"text": "Once upon a time"}

A dialog may have "tools", and an assistant's message the "weight" 0, which excludes it from the
loss. Other fields are ignored.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama32.text.chat import Chat
from llama32.text.tokenizer import Tokenizer
from llama32.train.data import Example

Record = Mapping[str, Any]
DEFAULT_DATE = "26 Jul 2024"  # the date that the Hub's template falls back to


class Examples(NamedTuple):
    """The examples of a file, and how many exceeded the context."""

    examples: list[Example]
    num_truncated: int  # cut at the end
    num_dropped: int  # left out, because the cut removed every token with a loss


def read_records(file: Path) -> list[Record]:
    """Read a JSON object per line; empty lines are skipped."""
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {number}: expected an object, got {record!r:.60}")
        records.append(record)
    return records


def to_examples(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    chat: Chat | None,
    context: int,
    date: str = DEFAULT_DATE,
) -> Examples:
    """Encode records and cut them to `context` tokens.

    Raises ValueError with the number of the first invalid record.
    """
    examples, num_cut, num_lost = [], 0, 0
    for number, record in enumerate(records, start=1):
        try:
            ids, loss_mask = to_example(record, tokenizer, chat, date)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None
        num_cut += len(ids) > context
        if any(loss_mask[:context]):
            examples.append(Example(ids[:context], loss_mask[:context]))
        else:
            num_lost += 1
    return Examples(examples, num_cut - num_lost, num_lost)


def to_example(record: Record, tokenizer: Tokenizer, chat: Chat | None, date: str) -> Example:
    """Encode a record of any kind."""
    if "messages" in record:
        if chat is None:
            raise ValueError("the record is a dialog, and this checkpoint has no chat format")
        return from_dialog(record, chat, date)
    if "text" in record:
        return from_texts(["", record["text"]], tokenizer)
    if "prompt" in record and "completion" in record:
        return from_texts([record["prompt"], record["completion"]], tokenizer)
    raise ValueError("found neither messages, nor a prompt and a completion, nor a text")


def from_dialog(record: Record, chat: Chat, date: str) -> Example:
    """Encode a dialog. The loss covers assistant messages, up to the end-of-turn token."""
    messages = record["messages"]
    ids = chat.encode(messages, record.get("tools"), date, add_generation_prompt=False)
    weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
    if bad := [weight for weight in weights if weight not in (0, 1)]:
        raise ValueError(f"a message's weight is {bad[0]!r}; allowed: 0, 1")
    loss_mask = [False] * len(ids)
    for span, weight in zip(chat.assistant_spans(ids), weights, strict=True):
        loss_mask[span.start : span.stop] = [bool(weight)] * len(span)
    if not any(loss_mask):
        raise ValueError("no assistant message to learn; give at least one, of weight 1")
    return Example(ids, loss_mask)


def from_texts(texts: Sequence[Any], tokenizer: Tokenizer) -> Example:
    """Encode a prompt and a completion separately, as at inference; the completion is learned."""
    if bad := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"expected a text, got {bad[0]!r:.60}")
    prompt, completion = texts
    prompt_ids = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    completion_ids = tokenizer.encode(completion, eos=tokenizer.eos_id is not None)
    if not completion:
        raise ValueError("the text to learn is empty")
    loss_mask = [False] * len(prompt_ids) + [True] * len(completion_ids)
    return Example(prompt_ids + completion_ids, loss_mask)
