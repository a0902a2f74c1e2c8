"""Reference counts of the pages of the cache, and the choice of pages for a sequence.

A page is free, referenced by sequences, or evictable: without a reference, but with content that
the prefix cache knows. Allocation takes free pages first. Then the page that has been evictable
for the longest time is evicted.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PageAllocator:
    """A pool of numbered pages. Calls `on_evict(page)` before an evictable page is reused."""

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        self.ref_counts = [0] * num_pages  # sequences that use each page
        self.num_free = num_pages
        self._on_evict = on_evict
        self._evictable: OrderedDict[int, None] = OrderedDict()  # in order of eviction
        self._in_use = bytearray(num_pages)  # 1 for a page that is not free

    @property
    def num_available(self) -> int:
        """Number of pages that can be allocated: free or evictable."""
        return self.num_free + len(self._evictable)

    @property
    def num_referenced(self) -> int:
        """Number of pages that sequences use."""
        return len(self.ref_counts) - self.num_available

    @property
    def evictable_pages(self) -> list[int]:
        """Evictable pages, in their order in the cache."""
        return sorted(self._evictable)

    def is_evictable(self, page: int) -> bool:
        """True if the page is cached and no sequence uses the page."""
        return page in self._evictable

    def allocate(self, count: int, after: int | None = None, room: int = 1) -> list[int]:
        """Allocate `count` pages for a sequence, consecutive where possible.

        Consecutive pages are read without a copy. The first page follows the page `after` if
        possible. Otherwise the first page has about `room` free pages in a row, to grow into.
        """
        assert count <= self.num_available, "check num_available before allocating"
        allocated: list[int] = []
        for _ in range(count):
            after = self._select_page(after, room)
            self.ref_counts[after] = self._in_use[after] = 1
            allocated.append(after)
        return allocated

    def incref(self, pages: Iterable[int]) -> None:
        """Add a reference to each page."""
        for page in pages:
            self._evictable.pop(page, None)
            self.ref_counts[page] += 1

    def decref(self, page: int, keep_cached: bool) -> None:
        """Remove a reference; after the last, the page is evictable or free."""
        self.ref_counts[page] -= 1
        assert self.ref_counts[page] >= 0, f"page {page} has no reference to remove"
        if not self.ref_counts[page]:
            self._evictable[page] = None
            if not keep_cached:
                self.discard(page)

    def discard(self, page: int) -> None:
        """Make an evictable page free."""
        del self._evictable[page]
        self._in_use[page] = 0
        self.num_free += 1

    def _select_page(self, after: int | None, room: int) -> int:
        if not self.num_free:
            page, _ = self._evictable.popitem(last=False)
            self._on_evict(page)
            return page
        self.num_free -= 1
        following = len(self._in_use) if after is None else after + 1
        if following < len(self._in_use) and not self._in_use[following]:
            return following
        while room:  # the first half of a gap is left to the sequence before the gap
            gap = self._in_use.find(bytes(2 * room))
            if gap >= 0:
                return gap + room
            room //= 2
        return self._in_use.index(0)
