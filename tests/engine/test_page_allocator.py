from collections import Counter
from random import Random

import pytest

from llama32.engine.page_allocator import PageAllocator


def make_pages(num_pages: int = 8) -> tuple[PageAllocator, list[int]]:
    """Return an allocator, and the list of pages evicted later."""
    evicted: list[int] = []
    return PageAllocator(num_pages, evicted.append), evicted


def counts(pages: PageAllocator) -> tuple[int, int, int]:
    return pages.num_free, pages.num_available, pages.num_referenced


def evictable(pages: PageAllocator) -> list[int]:
    found = [page for page in range(len(pages.ref_counts)) if pages.is_evictable(page)]
    assert found == pages.evictable_pages
    return found


def test_allocated_pages_have_one_reference():
    pages, _ = make_pages()
    assert counts(pages) == (8, 8, 0)
    taken = pages.allocate(3)
    assert len(set(taken)) == 3
    assert [pages.ref_counts[page] for page in taken] == [1, 1, 1]
    assert sum(pages.ref_counts) == 3
    assert counts(pages) == (5, 5, 3)
    assert not set(taken) & set(pages.allocate(5))
    assert counts(pages) == (0, 0, 8)


def test_allocating_no_pages_changes_nothing():
    pages, _ = make_pages()
    assert pages.allocate(0) == []
    assert counts(pages) == (8, 8, 0)


def test_more_pages_than_available_cannot_be_allocated():
    pages, _ = make_pages()
    pages.allocate(6)
    with pytest.raises(AssertionError, match="num_available"):
        pages.allocate(3)
    assert counts(pages) == (2, 2, 6)


def test_a_page_is_in_use_until_the_last_reference_is_removed():
    pages, _ = make_pages()
    taken = pages.allocate(2)
    pages.incref(taken)
    for page in taken:
        pages.decref(page, keep_cached=False)
    assert counts(pages) == (6, 6, 2)
    for page in taken:
        pages.decref(page, keep_cached=False)
    assert counts(pages) == (8, 8, 0)
    assert evictable(pages) == []


def test_removing_a_reference_that_does_not_exist_is_an_error():
    pages, _ = make_pages()
    (page,) = pages.allocate(1)
    pages.decref(page, keep_cached=False)
    with pytest.raises(AssertionError, match=f"page {page} has no reference to remove"):
        pages.decref(page, keep_cached=False)


def test_a_cached_page_without_references_is_evictable_and_available():
    pages, evicted = make_pages()
    (page,) = pages.allocate(1)
    pages.incref([page])
    pages.decref(page, keep_cached=True)
    assert not pages.is_evictable(page)
    pages.decref(page, keep_cached=True)
    assert pages.is_evictable(page)
    assert counts(pages) == (7, 8, 0)
    assert evicted == []


def test_an_evictable_page_can_be_referenced_again():
    pages, evicted = make_pages()
    taken = pages.allocate(2)
    for page in taken:
        pages.decref(page, keep_cached=True)
    pages.incref(taken[:1])
    assert evictable(pages) == taken[1:]
    assert pages.ref_counts[taken[0]] == 1
    assert counts(pages) == (6, 7, 1)
    assert evicted == []


def test_a_discarded_page_is_not_evicted_later():
    pages, evicted = make_pages()
    (page,) = pages.allocate(1)
    pages.decref(page, keep_cached=True)
    pages.discard(page)
    assert counts(pages) == (8, 8, 0)
    assert sorted(pages.allocate(8)) == list(range(8))
    assert evicted == []


def test_evictable_pages_are_only_allocated_when_no_page_is_free():
    pages, evicted = make_pages()
    taken = pages.allocate(3)
    for page in taken:
        pages.decref(page, keep_cached=True)
    free = pages.allocate(5, after=taken[0])
    assert not set(free) & set(taken)
    assert evicted == []
    assert counts(pages) == (0, 3, 5)
    pages.allocate(1)
    assert len(evicted) == 1


def test_the_page_that_is_evictable_for_longest_is_evicted_first_and_reported():
    pages, evicted = make_pages(4)
    taken = pages.allocate(4)
    order = [taken[i] for i in (2, 0, 3, 1)]
    for page in order:
        pages.decref(page, keep_cached=True)
    assert pages.allocate(3) == evicted == order[:3]
    assert evictable(pages) == order[3:]
    assert counts(pages) == (0, 1, 3)


def test_a_page_referenced_meanwhile_is_evicted_last():
    pages, evicted = make_pages(3)
    first, second, third = pages.allocate(3)
    for page in (first, second, third):
        pages.decref(page, keep_cached=True)
    pages.incref([first])
    pages.decref(first, keep_cached=True)
    pages.allocate(3)
    assert evicted == [second, third, first]


def test_a_page_that_was_evicted_is_like_any_other():
    pages, evicted = make_pages(1)
    pages.allocate(1)
    for _ in range(2):
        pages.decref(0, keep_cached=True)
        assert pages.allocate(1) == [0]
    assert evicted == [0, 0]
    pages.decref(0, keep_cached=False)
    assert counts(pages) == (1, 1, 0)


def test_a_sequence_grows_behind_its_last_page():
    pages, _ = make_pages(16)
    taken = pages.allocate(3, room=4)
    assert taken == list(range(taken[0], taken[0] + 3))
    assert pages.allocate(2, after=taken[-1], room=4) == [taken[-1] + 1, taken[-1] + 2]


def test_a_new_sequence_leaves_room_in_front_of_it_and_finds_room_behind():
    pages, _ = make_pages(16)
    first = pages.allocate(1, room=4)
    second = pages.allocate(1, room=4)
    assert first == [4]
    assert second == [9]
    assert pages.allocate(4, after=4) == [5, 6, 7, 8]
    assert pages.allocate(4, after=9) == [10, 11, 12, 13]


def test_where_there_is_less_room_half_of_it_serves_and_so_on():
    pages, _ = make_pages(16)
    pages.allocate(16)
    for page in (1, 4, 5, 8, 9, 10, 11):
        pages.decref(page, keep_cached=False)
    assert pages.allocate(1, room=4) == [10]
    assert pages.allocate(1, room=4) == [5]


def test_where_all_is_in_pieces_any_free_page_serves():
    pages, _ = make_pages(8)
    pages.allocate(8)
    for page in (6, 3, 0):
        pages.decref(page, keep_cached=False)
    assert pages.allocate(3, room=4) == [0, 3, 6]


def test_a_sequence_that_cannot_grow_in_place_goes_on_where_there_is_room():
    pages, _ = make_pages(16)
    pages.allocate(16)
    for page in (1, *range(6, 16)):
        pages.decref(page, keep_cached=False)
    assert pages.allocate(3, after=4, room=3) == [9, 10, 11]
    assert pages.allocate(2, after=15, room=1) == [7, 8]


def test_growth_never_evicts_the_following_page_while_others_are_free():
    pages, evicted = make_pages(8)
    first, second = pages.allocate(2, room=2)
    pages.decref(second, keep_cached=True)
    assert pages.allocate(1, after=first) != [second]
    assert evicted == []


def test_the_counts_are_exact_after_anything():
    random = Random(0)
    pages, evicted = make_pages(12)
    references: Counter[int] = Counter()
    cached: set[int] = set()
    for _ in range(2000):
        match random.randrange(4):
            case 0 if pages.num_available:
                taken = pages.allocate(random.randint(1, pages.num_available), room=3)
                assert not set(taken) & references.keys()
                references.update(taken)
                assert set(evicted) == cached & set(taken)
                cached.difference_update(taken)
            case 1 if references or cached:
                page = random.choice(sorted(references.keys() | cached))
                pages.incref([page])
                references[page] += 1
                cached.discard(page)
            case 2 if references:
                page, keep_cached = random.choice(sorted(references)), random.random() < 0.5
                pages.decref(page, keep_cached)
                references = +(references - Counter([page]))
                if keep_cached and page not in references:
                    cached.add(page)
            case 3 if cached and random.random() < 0.2:
                page = random.choice(sorted(cached))
                pages.discard(page)
                cached.discard(page)
        evicted.clear()
        assert pages.ref_counts == [references[page] for page in range(12)]
        assert set(evictable(pages)) == cached
        assert counts(pages) == (
            12 - len(references) - len(cached),
            12 - len(references),
            len(references),
        )
