"""Records as people keep them -> examples: ids, and which of them are to be learned.

A record is a dialog, in the form of OpenAI's fine-tuning files, of which the assistant's tokens are
learned; a prompt and its completion, which is learned; or a text, all of which is:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"prompt": "Once upon", "completion": " a time"}
    {"text": "Once upon a time"}

A dialog may have "tools", and a message of the assistant's the "weight" 0, not to be learned. Other
fields are of no account.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama32.chat import Chat
from llama32.tokenizer import Tokenizer
from llama32.train.data import Example

Record = Mapping[str, Any]
DATE = "26 Jul 2024"  # what the Hub's template takes for today where it cannot know


class Examples(NamedTuple):
    """All of a file, and what a context too short has done to them."""

    examples: list[Example]
    num_cut: int  # lost their end
    num_lost: int  # lost all that was to be learned, and are left out


def read_records(file: Path) -> list[Record]:
    """One JSON object a line; empty lines are passed over."""
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
    date: str = DATE,
) -> Examples:
    """Each as the model will see it, cut to `context` tokens. ValueError with the number of the
    first that is no example."""
    examples, num_cut, num_lost = [], 0, 0
    for number, record in enumerate(records, start=1):
        try:
            ids, learned = to_example(record, tokenizer, chat, date)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None
        num_cut += len(ids) > context
        if any(learned[:context]):
            examples.append(Example(ids[:context], learned[:context]))
        else:
            num_lost += 1
    return Examples(examples, num_cut - num_lost, num_lost)


def to_example(record: Record, tokenizer: Tokenizer, chat: Chat | None, date: str) -> Example:
    """One record, in whichever form it is."""
    if "messages" in record:
        if chat is None:
            raise ValueError("it is a dialog, and this checkpoint has no chat format")
        return of_dialog(record, chat, date)
    if "text" in record:
        return of_texts(["", record["text"]], tokenizer)
    if "prompt" in record and "completion" in record:
        return of_texts([record["prompt"], record["completion"]], tokenizer)
    raise ValueError("it has neither messages, nor a prompt and a completion, nor a text")


def of_dialog(record: Record, chat: Chat, date: str) -> Example:
    """A dialog: what the assistant says is learned, up to the token that ends its turn."""
    messages = record["messages"]
    ids = chat.encode(messages, record.get("tools"), date, add_generation_prompt=False)
    weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
    if bad := [weight for weight in weights if weight not in (0, 1)]:
        raise ValueError(f"a message's weight is {bad[0]!r}; allowed: 0, 1")
    learned = [False] * len(ids)
    for answer, weight in zip(chat.answers(ids), weights, strict=True):
        learned[answer.start : answer.stop] = [bool(weight)] * len(answer)
    if not any(learned):
        raise ValueError("the assistant says nothing in it that is to be learned")
    return Example(ids, learned)


def of_texts(texts: Sequence[Any], tokenizer: Tokenizer) -> Example:
    """A prompt, and what is learned to come after it: encoded apart, as a prompt will be."""
    if bad := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"expected a text, got {bad[0]!r:.60}")
    prompt, completion = texts
    given = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    wanted = tokenizer.encode(completion, eos=tokenizer.eos_id is not None)
    if not completion:
        raise ValueError("there is no text in it to be learned")
    return Example(given + wanted, [False] * len(given) + [True] * len(wanted))
