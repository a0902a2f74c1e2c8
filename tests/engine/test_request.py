import pytest

from llama32.engine.request import Request


def make_request(prompt=(10, 11, 12), output=(20, 21, 22), **options) -> Request:
    return Request(prompt=list(prompt), max_length=20, output=list(output), **options)


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("stop", range(7))
def test_ids_are_those_of_the_prompt_and_then_of_the_output(start, stop):
    ids = make_request().ids(start, stop)
    assert list(ids) == [10, 11, 12, 20, 21, 22][start:stop]


def test_ids_end_where_the_output_does():
    assert list(make_request().ids(2, 100)) == [12, 20, 21, 22]
    assert list(make_request(output=()).ids(2, 100)) == [12]


def test_ids_can_be_changed_without_changing_the_request():
    request = make_request()
    for start, stop in ((0, 3), (2, 4), (3, 6)):
        ids = request.ids(start, stop)
        assert isinstance(ids, list)
        ids.clear()
    assert request.prompt == [10, 11, 12]
    assert request.output == [20, 21, 22]


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("stop", range(9))
@pytest.mark.parametrize("output", [(), (20, 21, 22)])
def test_behind_the_known_tokens_come_the_drafts(start, stop, output):
    request = make_request(output=output, drafts=[30, 31])
    assert list(request.ids(start, stop)) == [10, 11, 12, *output, 30, 31][start:stop]
    assert request.length == 3 + len(output)


def test_whoever_has_a_next_token_has_all_before_it_in_the_cache():
    request = make_request(num_computed=5)
    request.append(23)
    assert (request.output, request.num_computed) == ([20, 21, 22, 23], 6)
    request.append(24)
    assert (request.output, request.num_computed) == ([20, 21, 22, 23, 24], 7)


def test_the_length_grows_with_the_output():
    request = make_request(output=())
    assert request.length == 3
    request.output.append(20)
    assert request.length == 4


def test_all_prompt_tokens_but_the_last_are_prefill():
    assert make_request().num_prefill_tokens == 2
    assert make_request(prompt=(10,)).num_prefill_tokens == 0


def test_a_new_request_has_done_nothing_and_shares_nothing():
    request, other = (Request(prompt=[1], max_length=2) for _ in range(2))
    assert (request.num_computed, request.num_cached, request.num_preemptions) == (0, 0, 0)
    assert request.finish_reason is None
    assert request.error is None
    request.pages.append(1)
    request.output.append(1)
    request.tokens.append(None)
    assert not other.pages
    assert not other.output
    assert not other.tokens


def test_two_requests_for_the_same_are_two():
    request, other = make_request(), make_request()
    assert request != other
    assert len({request, other}) == 2
