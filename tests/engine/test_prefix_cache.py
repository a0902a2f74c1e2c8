import pytest

from llama32.engine.prefix_cache import PageKey, PrefixCache, page_keys


def chain(*names: int, digests: tuple[int, ...] | None = None) -> list[PageKey]:
    """Return keys of pages with a single token each; digests may collide."""
    digests = digests or tuple(hash(names[: i + 1]) for i in range(len(names)))
    return [PageKey(digest, (name,)) for digest, name in zip(digests, names, strict=True)]


def insert_chain(prefixes: PrefixCache, keys: list[PageKey], pages: list[int]) -> None:
    for i, (key, page) in enumerate(zip(keys, pages, strict=True)):
        prefixes.insert(key, page, pages[i - 1] if i else None)


@pytest.mark.parametrize(("length", "full"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (9, 2)])
def test_only_full_pages_have_keys(length, full):
    tokens = list(range(length))
    keys = page_keys(tokens, 4)
    assert [key.tokens for key in keys] == [tuple(tokens[4 * i : 4 * i + 4]) for i in range(full)]


def test_the_keys_of_a_prefix_are_the_first_keys_of_the_whole():
    tokens = list(range(30))
    for length in range(30):
        assert page_keys(tokens[:length], 4) == page_keys(tokens, 4)[: length // 4]


def test_a_digest_tells_all_tokens_before_the_page_too():
    first, second = page_keys([1, 2, 3, 4], 2), page_keys([9, 2, 3, 4], 2)
    assert first[1].tokens == second[1].tokens
    assert first[1].digest != second[1].digest
    again = page_keys([1, 2, 1, 2], 2)
    assert again[0].digest != again[1].digest


def test_the_digest_of_a_page_is_the_same_from_any_kind_of_sequence():
    assert page_keys((1, 2, 3), 2) == page_keys([1, 2, 3], 2)


def test_as_many_pages_are_found_as_begin_alike():
    prefixes = PrefixCache()
    insert_chain(prefixes, page_keys([1, 2, 3, 4, 5, 6], 2), [7, 3, 5])
    assert prefixes.match(page_keys([1, 2, 3, 4, 5, 6, 7, 8], 2)) == [7, 3, 5]
    assert prefixes.match(page_keys([1, 2, 3, 4, 9, 6], 2)) == [7, 3]
    assert prefixes.match(page_keys([9, 2, 3, 4, 5, 6], 2)) == []
    assert prefixes.match(page_keys([3, 4, 5, 6], 2)) == []
    assert prefixes.match([]) == []


def test_two_prompts_may_go_on_differently_behind_a_page():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, 2), [0, 1])
    prefixes.insert(chain(1, 3)[1], 2, 0)
    assert prefixes.match(chain(1, 2)) == [0, 1]
    assert prefixes.match(chain(1, 3)) == [0, 2]


def test_inserted_pages_are_contained():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, 2), [4, 6])
    assert len(prefixes) == 2
    assert 4 in prefixes
    assert 6 in prefixes
    assert 5 not in prefixes


def test_other_tokens_with_the_same_digest_are_no_hit():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, digests=(77,)), [0])
    assert prefixes.match(chain(2, digests=(77,))) == []


def test_the_same_tokens_with_the_same_digest_behind_others_are_no_hit():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, 5, digests=(10, 77)), [0, 1])
    insert_chain(prefixes, chain(2, digests=(20,)), [2])
    assert prefixes.match(chain(1, 5, digests=(10, 77))) == [0, 1]
    assert prefixes.match(chain(2, 5, digests=(20, 77))) == [2]
    assert prefixes.match(chain(5, digests=(77,))) == []


def test_a_first_page_is_no_hit_behind_another():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(5, digests=(77,)), [0])
    assert prefixes.match(chain(1, 5, digests=(10, 77))) == []
    insert_chain(prefixes, chain(1, digests=(10,)), [1])
    assert prefixes.match(chain(1, 5, digests=(10, 77))) == [1]


def test_a_digest_that_is_taken_stays_with_the_page_it_is_of():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1), [0])
    insert_chain(prefixes, chain(1), [3])
    assert prefixes.match(chain(1)) == [0]
    assert 3 not in prefixes
    prefixes.insert(PageKey(chain(1)[0].digest, (2,)), 4, None)
    assert prefixes.match(chain(1)) == [0]
    assert len(prefixes) == 1


def test_nothing_is_inserted_behind_an_unknown_page():
    prefixes = PrefixCache()
    prefixes.insert(chain(1, 2)[1], 1, 0)
    assert len(prefixes) == 0
    insert_chain(prefixes, chain(1), [0])
    insert_chain(prefixes, chain(1, 2), [5, 6])
    assert 6 not in prefixes
    assert prefixes.match(chain(1, 2)) == [0]


def test_an_evicted_page_is_not_found_and_can_be_inserted_again():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, 2), [0, 1])
    prefixes.evict(1)
    assert prefixes.match(chain(1, 2)) == [0]
    assert 1 not in prefixes
    prefixes.insert(chain(1, 2)[1], 8, 0)
    assert prefixes.match(chain(1, 2)) == [0, 8]
    prefixes.insert(chain(1, 2, 3)[2], 1, 8)
    assert prefixes.match(chain(1, 2, 3)) == [0, 8, 1]


def test_a_page_behind_one_that_was_replaced_is_not_found():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, 2), [0, 1])
    prefixes.evict(0)
    assert prefixes.match(chain(1, 2)) == []
    insert_chain(prefixes, chain(1), [5])
    assert prefixes.match(chain(1, 2)) == [5]


def test_all_pages_can_be_cleared_at_once():
    prefixes = PrefixCache()
    insert_chain(prefixes, chain(1, 2), [3, 1])
    assert sorted(prefixes.clear()) == [1, 3]
    assert len(prefixes) == 0
    assert 3 not in prefixes
    assert prefixes.match(chain(1, 2)) == []
    assert prefixes.clear() == []
    insert_chain(prefixes, chain(1, 2), [1, 3])
    assert prefixes.match(chain(1, 2)) == [1, 3]
