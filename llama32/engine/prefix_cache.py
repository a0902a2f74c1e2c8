"""Prefix caching: prompts that begin alike share the full pages of their common beginning.

The content of a page depends on the page's tokens and on all tokens before. The key of a page is
therefore a chain: a digest of the page's tokens and of the digest before. Digests can collide, so a
hit also compares the tokens, and the page before must be a hit. A request can therefore never read
a page of a different prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PageKey(NamedTuple):
    """The content of a full page."""

    digest: int  # of the page's tokens and of all tokens before
    tokens: tuple[int, ...]


def page_keys(tokens: Sequence[int], page_size: int) -> list[PageKey]:
    """Return the keys of all full pages of `tokens`."""
    keys: list[PageKey] = []
    digest = 0
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = tuple(tokens[start : start + page_size])
        digest = hash((digest, page))
        keys.append(PageKey(digest, page))
    return keys


@dataclass(eq=False)
class _Entry:
    key: PageKey
    page: int
    parent: "_Entry | None"


class PrefixCache:
    """Finds pages by their content."""

    def __init__(self) -> None:
        self._by_digest: dict[int, _Entry] = {}
        self._by_page: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def match(self, keys: Sequence[PageKey]) -> list[int]:
        """Return the pages of the longest cached prefix of `keys`."""
        pages: list[int] = []
        parent = None
        for key in keys:
            entry = self._by_digest.get(key.digest)
            if entry is None or entry.key.tokens != key.tokens or entry.parent is not parent:
                break
            pages.append(entry.page)
            parent = entry
        return pages

    def insert(self, key: PageKey, page: int, after: int | None) -> None:
        """Record that `page` has the content of `key` and follows the page `after`.

        Does nothing if the digest is taken, by a page of equal content or by a collision. Does
        nothing if `after` is not cached either, because no match could reach `page`.
        """
        if key.digest in self._by_digest or (after is not None and after not in self._by_page):
            return
        entry = _Entry(key, page, None if after is None else self._by_page[after])
        self._by_digest[key.digest] = self._by_page[page] = entry

    def evict(self, page: int) -> None:
        """Remove a page whose content is about to be overwritten or is not valid."""
        del self._by_digest[self._by_page.pop(page).key.digest]

    def clear(self) -> list[int]:
        """Remove all pages and return their numbers."""
        pages = list(self._by_page)
        self._by_digest.clear()
        self._by_page.clear()
        return pages
