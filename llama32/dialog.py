"""A chat at the terminal: turns that are typed or piped in, and a history that survives Ctrl-C."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from llama32.llm import LLM
from llama32.terminal import complain, decode, note, out
from llama32.transcript import Result

HELP = """\
/reset   forget the dialog and start a new one
/exit    leave; so do Ctrl-D and Ctrl-C
Ctrl-C during an answer stops it; what was said stays part of the dialog"""


class Dialog:
    """A chat so far, and how its answers are shown."""

    def __init__(
        self, llm: LLM, show: Callable[..., Result], system: str | None, **settings: Any
    ) -> None:
        self.llm = llm
        self.show = show
        self.settings = settings
        self.opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = [*self.opening]

    def answer(self, text: str) -> Result:
        """Let the model take its turn. What it said is kept, also where it was interrupted."""
        messages = [*self.messages, {"role": "user", "content": text}]
        result = self.show(partial(self.llm.stream_chat, messages, **self.settings))
        said = result.message
        assert said is not None
        if len(said["tool_calls"]) > 1:  # the Hub's format takes but one; as text it takes them all
            said = {"role": "assistant", "content": result.text}
        if result.text:
            self.messages = [*messages, said]
        return result


def converse(dialog: Dialog) -> None:
    """Turns typed at a terminal. What goes wrong with one does not end the dialog."""
    for text in typed_turns():
        if text == "/exit":
            return
        if text == "/reset":
            dialog.reset()
        elif re.fullmatch(r"/\w*", text):
            note(HELP)
        elif text:
            try:
                usage = dialog.answer(text).usage
                context = dialog.llm.config.max_position_embeddings
                if usage.prompt_tokens + usage.completion_tokens >= context:
                    note(f"the context of {context} tokens is full; /reset starts a new dialog")
            except (ValueError, MemoryError) as error:
                complain(error, "; /reset starts a new dialog")
            except KeyboardInterrupt:  # before the answer began
                note("interrupted")
            out.print()


def typed_turns() -> Iterator[str]:
    """What comes at the prompt, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # gives input() arrows and history, and only it needs that

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ").strip()
    out.print()


def piped_turns() -> Iterator[str]:
    """The lines of standard input, but for blank ones."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if text := decode(line, f"stdin, line {number}").strip():
            yield text
