"""A chat at the terminal: typed or piped turns; Ctrl-C keeps the history."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from llama32.cli.terminal import decode_utf8, note, out, print_error
from llama32.llm.llm import LLM
from llama32.llm.result import Result

HELP = """\
/reset   clear the dialog and start a new one
/exit    leave; Ctrl-D and Ctrl-C leave as well
Ctrl-C during an answer stops the answer; the text so far stays in the dialog"""


class Dialog:
    """The messages of a chat, and the function that shows answers."""

    def __init__(
        self, llm: LLM, show: Callable[..., Result], system: str | None, **settings: Any
    ) -> None:
        self.llm = llm
        self.show = show
        self.settings = settings
        self.initial_messages = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = [*self.initial_messages]

    def answer(self, text: str) -> Result:
        """Generate and show an answer; an interrupted answer stays in the dialog as well."""
        messages = [*self.messages, {"role": "user", "content": text}]
        result = self.show(partial(self.llm.stream_chat, messages, **self.settings))
        answer = result.message
        assert answer is not None
        # The Hub's template renders one tool call per message; several stay as text.
        if len(answer["tool_calls"]) > 1:
            answer = {"role": "assistant", "content": result.text}
        if result.text:
            self.messages = [*messages, answer]
        return result


def run_repl(dialog: Dialog) -> None:
    """Run a dialog of typed turns; an error in a turn does not end the dialog."""
    for text in typed_messages():
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
                print_error(error, "; /reset starts a new dialog")
            except KeyboardInterrupt:  # before the answer began
                note("interrupted")
            out.print()


def typed_messages() -> Iterator[str]:
    """Yield typed lines until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # arrow keys and history for input()

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ").strip()
    out.print()


def piped_messages() -> Iterator[str]:
    """Yield the lines of standard input that are not blank."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if text := decode_utf8(line, f"stdin, line {number}").strip():
            yield text
