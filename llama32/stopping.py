"""Stop strings over streamed text, wherever the pieces are cut."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, and never shows what might become one.

    The text ends as soon as any stop string is complete, as if it came character by character: of
    two that overlap the one that ends first counts, of two that end together the longer one.
    Hence all that is shown depends on the text alone and not on the pieces it comes in.
    """

    def __init__(self, stops: Sequence[str]):
        self.hit: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece and returns what is safe to show; after a hit, nothing more."""
        if not self._stops:
            return text
        if self.hit is not None:
            return ""
        self._held += text
        starts = {stop: self._held.find(stop) for stop in self._stops}
        ends = [(at + len(stop), -len(stop), stop) for stop, at in starts.items() if at >= 0]
        if ends:
            end, _, self.hit = min(ends)
            shown, self._held = self._held[: end - len(self.hit)], ""
            return shown
        safe = len(self._held) - max(map(self._begun, self._stops), default=0)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def flush(self) -> str:
        """What was held back, once the text has ended for another reason."""
        rest, self._held = self._held, ""
        return rest

    def _begun(self, stop: str) -> int:
        """How many characters at the end of what is held could be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
