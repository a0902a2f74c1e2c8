"""Prefix caching: pages that are full of a prompt's beginning serve every prompt that begins so.

What a page holds depends on its own tokens and all before them, so its key is a digest of both:
a chain. A digest alone could be that of other tokens; a hit must have the same tokens, behind a
page that was itself a hit. Hence no request can ever read what is not its own prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PageKey(NamedTuple):
    """What a full page holds."""

    digest: int  # of its tokens and of all before
    tokens: tuple[int, ...]


def page_keys(tokens: Sequence[int], page_size: int) -> list[PageKey]:
    """The keys of all pages that these tokens fill."""
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


class Prefixes:
    """The pages whose content is known, found by their keys."""

    def __init__(self) -> None:
        self._by_digest: dict[int, _Entry] = {}
        self._by_page: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def find(self, keys: Sequence[PageKey]) -> list[int]:
        """The pages of as many of the first keys as are known."""
        pages: list[int] = []
        parent = None
        for key in keys:
            entry = self._by_digest.get(key.digest)
            if entry is None or entry.key.tokens != key.tokens or entry.parent is not parent:
                break
            pages.append(entry.page)
            parent = entry
        return pages

    def remember(self, key: PageKey, page: int, after: int | None) -> None:
        """`page` now holds what `key` says, behind the page `after`.

        Nothing happens where the digest is taken: by the same content in another page, or by other
        content. Nor where `after` is unknown, since nobody could come to this page.
        """
        if key.digest in self._by_digest or (after is not None and after not in self._by_page):
            return
        entry = _Entry(key, page, None if after is None else self._by_page[after])
        self._by_digest[key.digest] = self._by_page[page] = entry

    def forget(self, page: int) -> None:
        """The page is about to hold something else."""
        del self._by_digest[self._by_page.pop(page).key.digest]

    def clear(self) -> list[int]:
        """Forget all, and tell which pages they were."""
        pages = list(self._by_page)
        self._by_digest.clear()
        self._by_page.clear()
        return pages
