from collections import Counter
from random import Random

import pytest

from llama32.engine.pages import Pages


def make_pages(num_pages: int = 8) -> tuple[Pages, list[int]]:
    """A pool, and the list of all that it evicts."""
    evicted: list[int] = []
    return Pages(num_pages, evicted.append), evicted


def counts(pages: Pages) -> tuple[int, int, int]:
    return pages.num_free, pages.num_available, pages.num_held


def idle(pages: Pages) -> list[int]:
    found = [page for page in range(len(pages.references)) if pages.is_idle(page)]
    assert found == pages.idle
    return found


def test_pages_that_are_taken_are_held_once():
    pages, _ = make_pages()
    assert counts(pages) == (8, 8, 0)
    taken = pages.take(3)
    assert len(set(taken)) == 3
    assert [pages.references[page] for page in taken] == [1, 1, 1]
    assert sum(pages.references) == 3
    assert counts(pages) == (5, 5, 3)
    assert not set(taken) & set(pages.take(5))
    assert counts(pages) == (0, 0, 8)


def test_taking_none_changes_nothing():
    pages, _ = make_pages()
    assert pages.take(0) == []
    assert counts(pages) == (8, 8, 0)


def test_more_than_there_are_cannot_be_taken():
    pages, _ = make_pages()
    pages.take(6)
    with pytest.raises(AssertionError, match="num_available"):
        pages.take(3)
    assert counts(pages) == (2, 2, 6)


def test_a_page_is_held_until_the_last_one_drops_it():
    pages, _ = make_pages()
    taken = pages.take(2)
    pages.hold(taken)
    for page in taken:
        pages.drop(page, remember=False)
    assert counts(pages) == (6, 6, 2)
    for page in taken:
        pages.drop(page, remember=False)
    assert counts(pages) == (8, 8, 0)
    assert idle(pages) == []


def test_a_page_dropped_by_more_than_held_it_is_an_error():
    pages, _ = make_pages()
    (page,) = pages.take(1)
    pages.drop(page, remember=False)
    with pytest.raises(AssertionError, match=f"page {page} was dropped by more"):
        pages.drop(page, remember=False)


def test_a_remembered_page_is_idle_and_as_good_as_free():
    pages, evicted = make_pages()
    (page,) = pages.take(1)
    pages.hold([page])
    pages.drop(page, remember=True)
    assert not pages.is_idle(page)
    pages.drop(page, remember=True)
    assert pages.is_idle(page)
    assert counts(pages) == (7, 8, 0)
    assert evicted == []


def test_an_idle_page_can_be_held_again():
    pages, evicted = make_pages()
    taken = pages.take(2)
    for page in taken:
        pages.drop(page, remember=True)
    pages.hold(taken[:1])
    assert idle(pages) == taken[1:]
    assert pages.references[taken[0]] == 1
    assert counts(pages) == (6, 7, 1)
    assert evicted == []


def test_an_idle_page_that_is_freed_is_not_evicted_later():
    pages, evicted = make_pages()
    (page,) = pages.take(1)
    pages.drop(page, remember=True)
    pages.free(page)
    assert counts(pages) == (8, 8, 0)
    assert sorted(pages.take(8)) == list(range(8))
    assert evicted == []


def test_idle_pages_are_only_taken_when_none_is_free():
    pages, evicted = make_pages()
    taken = pages.take(3)
    for page in taken:
        pages.drop(page, remember=True)
    free = pages.take(5, after=taken[0])
    assert not set(free) & set(taken)
    assert evicted == []
    assert counts(pages) == (0, 3, 5)
    pages.take(1)
    assert len(evicted) == 1


def test_the_page_that_is_idle_for_longest_is_evicted_first_and_told_of():
    pages, evicted = make_pages(4)
    taken = pages.take(4)
    order = [taken[i] for i in (2, 0, 3, 1)]
    for page in order:
        pages.drop(page, remember=True)
    assert pages.take(3) == evicted == order[:3]
    assert idle(pages) == order[3:]
    assert counts(pages) == (0, 1, 3)


def test_a_page_asked_for_meanwhile_is_evicted_last():
    pages, evicted = make_pages(3)
    first, second, third = pages.take(3)
    for page in (first, second, third):
        pages.drop(page, remember=True)
    pages.hold([first])
    pages.drop(first, remember=True)
    pages.take(3)
    assert evicted == [second, third, first]


def test_a_page_that_was_evicted_is_like_any_other():
    pages, evicted = make_pages(1)
    pages.take(1)
    for _ in range(2):
        pages.drop(0, remember=True)
        assert pages.take(1) == [0]
    assert evicted == [0, 0]
    pages.drop(0, remember=False)
    assert counts(pages) == (1, 1, 0)


def test_a_sequence_grows_behind_its_last_page():
    pages, _ = make_pages(16)
    taken = pages.take(3, room=4)
    assert taken == list(range(taken[0], taken[0] + 3))
    assert pages.take(2, after=taken[-1], room=4) == [taken[-1] + 1, taken[-1] + 2]


def test_a_new_sequence_leaves_room_in_front_of_it_and_finds_room_behind():
    pages, _ = make_pages(16)
    first = pages.take(1, room=4)
    second = pages.take(1, room=4)
    assert first == [4]
    assert second == [9]
    assert pages.take(4, after=4) == [5, 6, 7, 8]
    assert pages.take(4, after=9) == [10, 11, 12, 13]


def test_where_there_is_less_room_half_of_it_serves_and_so_on():
    pages, _ = make_pages(16)
    pages.take(16)
    for page in (1, 4, 5, 8, 9, 10, 11):
        pages.drop(page, remember=False)
    assert pages.take(1, room=4) == [10]
    assert pages.take(1, room=4) == [5]


def test_where_all_is_in_pieces_any_free_page_serves():
    pages, _ = make_pages(8)
    pages.take(8)
    for page in (6, 3, 0):
        pages.drop(page, remember=False)
    assert pages.take(3, room=4) == [0, 3, 6]


def test_a_sequence_that_cannot_grow_in_place_goes_on_where_there_is_room():
    pages, _ = make_pages(16)
    pages.take(16)
    for page in (1, *range(6, 16)):
        pages.drop(page, remember=False)
    assert pages.take(3, after=4, room=3) == [9, 10, 11]
    assert pages.take(2, after=15, room=1) == [7, 8]


def test_growth_never_takes_an_idle_page_from_behind_while_others_are_free():
    pages, evicted = make_pages(8)
    first, second = pages.take(2, room=2)
    pages.drop(second, remember=True)
    assert pages.take(1, after=first) != [second]
    assert evicted == []


def test_the_counts_are_exact_after_anything():
    random = Random(0)
    pages, evicted = make_pages(12)
    held: Counter[int] = Counter()
    remembered: set[int] = set()
    for _ in range(2000):
        match random.randrange(4):
            case 0 if pages.num_available:
                taken = pages.take(random.randint(1, pages.num_available), room=3)
                assert not set(taken) & held.keys()
                held.update(taken)
                assert set(evicted) == remembered & set(taken)
                remembered.difference_update(taken)
            case 1 if held or remembered:
                page = random.choice(sorted(held.keys() | remembered))
                pages.hold([page])
                held[page] += 1
                remembered.discard(page)
            case 2 if held:
                page, remember = random.choice(sorted(held)), random.random() < 0.5
                pages.drop(page, remember)
                held = +(held - Counter([page]))
                if remember and page not in held:
                    remembered.add(page)
            case 3 if remembered and random.random() < 0.2:
                page = random.choice(sorted(remembered))
                pages.free(page)
                remembered.discard(page)
        evicted.clear()
        assert pages.references == [held[page] for page in range(12)]
        assert set(idle(pages)) == remembered
        assert counts(pages) == (12 - len(held) - len(remembered), 12 - len(held), len(held))
