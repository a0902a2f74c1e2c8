"""Stop strings in streamed text, across the borders of pieces."""

from collections.abc import Sequence


class StopStrings:
    """A filter for streamed text that ends at the first stop string.

    Text that may begin a stop string is held back. The text ends as if characters came one by one:
    of two overlapping stop strings the first to end counts, of two that end together the longer.
    Hence the output depends on the text alone, not on the pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.hit: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Add the next piece and return the text to show, which is empty after a hit."""
        if not self._stops:
            return text
        if self.hit is not None:
            return ""
        self._held += text
        starts = {stop: self._held.find(stop) for stop in self._stops}
        ends = [(i + len(stop), -len(stop), stop) for stop, i in starts.items() if i >= 0]
        if ends:
            end, _, self.hit = min(ends)
            shown, self._held = self._held[: end - len(self.hit)], ""
            return shown
        safe = len(self._held) - max(map(self._partial_match, self._stops), default=0)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def flush(self) -> str:
        """Return the held text when the text ends for another reason."""
        rest, self._held = self._held, ""
        return rest

    def _partial_match(self, stop: str) -> int:
        """Return how many characters at the end of the held text may begin `stop`."""
        max_length = min(len(stop) - 1, len(self._held))
        lengths = range(max_length, 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
