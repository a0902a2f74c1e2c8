"""Text piece by piece, for one who waits for it."""

from collections.abc import Iterator

from llama32.chat import Chat
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.tokenizer import Tokenizer
from llama32.transcript import Result, Transcript


class Stream(Iterator[str]):
    """Iterate for the pieces; afterwards `result` holds the whole. Of a chat, tool calls are no
    pieces: they come as a whole, in `result.message`.

    It begins to move when someone asks for a piece, of this stream or of another of its engine.
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
        self._transcript = Transcript(request, tokenizer, chat)

    def __next__(self) -> str:
        while not self.has_ended:
            self._engine.wait(self._request, len(self._transcript.tokens))
            if piece := self.catch_up():
                return piece
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

    def __del__(self) -> None:
        """Nobody is going to listen any more."""
        self._engine.abort(self._request)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self._transcript.has_ended

    def catch_up(self) -> str:
        """The text of what was generated since the last time; nothing is waited for."""
        piece = self._transcript.catch_up()
        if self.has_ended:  # at a stop string the request would go on
            self._engine.abort(self._request)
        return piece

    def run(self) -> Result:
        """Wait for the whole."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Abort it, if it has not ended."""
        self._engine.abort(self._request)
        self._transcript.reason = self._transcript.reason or "abort"

    @property
    def result(self) -> Result:
        """The whole, or after a Ctrl-C what there is of it. Asking ends one that still runs."""
        self.close()
        return self._transcript.result
