"""Which pages of the cache are free, and how many sequences hold each of the others.

A page is free, held, or idle: held by nobody, but remembered for what is in it. Idle pages are as
good as free. They are only taken last, those that nobody asked for longest first.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable


class Pages:
    """A pool of numbered pages. `on_evict` is told of every idle page that is taken again."""

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        self.references = [0] * num_pages  # how many sequences hold each
        self.num_free = num_pages
        self._on_evict = on_evict
        self._idle: OrderedDict[int, None] = OrderedDict()  # next to be evicted first
        self._in_use = bytearray(num_pages)  # 1 where a page is held or idle

    @property
    def num_available(self) -> int:
        """Pages that can be taken."""
        return self.num_free + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that cannot."""
        return len(self.references) - self.num_available

    @property
    def idle(self) -> list[int]:
        """Those that are remembered and held by nobody, in their order in the cache."""
        return sorted(self._idle)

    def is_idle(self, page: int) -> bool:
        """Whether its content is remembered and nobody holds it."""
        return page in self._idle

    def take(self, count: int, after: int | None = None, room: int = 1) -> list[int]:
        """Hold `count` pages that nobody else holds, each right behind the last where it can be.

        The first comes behind the page `after`; else where about `room` free pages lie in a row,
        so that a sequence can grow into them: pages in a row are read without a copy.
        """
        assert count <= self.num_available, "ask num_available first"
        taken: list[int] = []
        for _ in range(count):
            after = self._next(after, room)
            self.references[after] = self._in_use[after] = 1
            taken.append(after)
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One more sequence holds these."""
        for page in pages:
            self._idle.pop(page, None)
            self.references[page] += 1

    def drop(self, page: int, remember: bool) -> None:
        """One sequence less holds it; the last one leaves it idle or free."""
        self.references[page] -= 1
        assert self.references[page] >= 0, f"page {page} was dropped by more than held it"
        if not self.references[page]:
            self._idle[page] = None
            if not remember:
                self.free(page)

    def free(self, page: int) -> None:
        """An idle page is not worth remembering any more."""
        del self._idle[page]
        self._in_use[page] = 0
        self.num_free += 1

    def _next(self, after: int | None, room: int) -> int:
        if not self.num_free:
            page, _ = self._idle.popitem(last=False)
            self._on_evict(page)
            return page
        self.num_free -= 1
        behind = len(self._in_use) if after is None else after + 1
        if behind < len(self._in_use) and not self._in_use[behind]:
            return behind
        while room:  # the first half of a gap is left to the sequence in front of it
            gap = self._in_use.find(bytes(2 * room))
            if gap >= 0:
                return gap + room
            room //= 2
        return self._in_use.index(0)
