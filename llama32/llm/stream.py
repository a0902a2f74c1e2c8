"""The output of a request, piece by piece, for a waiting caller."""

from collections.abc import Iterator

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.llm.result import Result, ResultBuilder
from llama32.text.chat import Chat
from llama32.text.tokenizer import Tokenizer


class Stream(Iterator[str]):
    """Pieces of text to iterate over; `result` then holds the whole output.

    In a chat, tool calls are not pieces: `result.message` holds them complete. The engine runs
    only while a caller waits for a piece, of this stream or of another on the same engine.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        tokenizer: Tokenizer | None,
        chat: Chat | None = None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._builder = ResultBuilder(request, tokenizer, chat)

    def __next__(self) -> str:
        while not self.is_finished:
            self._engine.wait(self._request, len(self._builder.tokens))
            if piece := self.update():
                return piece
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

    def __del__(self) -> None:
        """Free the pages of an abandoned request."""
        self._engine.abort(self._request)

    @property
    def is_finished(self) -> bool:
        """True if no more text follows."""
        return self._builder.is_finished

    def update(self) -> str:
        """Process new tokens without waiting, and return the new text."""
        piece = self._builder.update()
        if self.is_finished:  # the engine does not know stop strings, and would continue
            self._engine.abort(self._request)
        return piece

    def run(self) -> Result:
        """Wait for the end and return the result. Raises the error of a failed request."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Abort the request if it still runs."""
        self._engine.abort(self._request)
        self._builder.finish_reason = self._builder.finish_reason or "abort"

    @property
    def result(self) -> Result:
        """The result. Reading it early aborts the request and returns the part generated."""
        self.close()
        return self._builder.result
