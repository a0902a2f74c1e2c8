import gc
import math
from collections import deque
from collections.abc import Iterator

import pytest

from llama32.llm import LLM
from llama32.loading import load
from tests.alphabet import alphabet_checkpoint


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = tmp_path_factory.mktemp("alphabet")
    return load(alphabet_checkpoint(folder, max_position_embeddings=1024))


@pytest.fixture
def fragile(llm) -> Iterator[LLM]:
    """What comes after an e is nan."""

    def spoil(_, args, x):
        return x.masked_fill((args[0] == ord("e")).unsqueeze(-1), math.nan)

    handle = llm.model.embed.register_forward_hook(spoil)
    yield llm
    handle.remove()


def assert_idle(llm: LLM) -> None:
    stats = llm.engine.stats
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


def test_two_streams_are_taken_in_turn(llm):
    one, two = llm.stream("a", max_new_tokens=3), llm.stream("p", max_new_tokens=3)
    assert list(zip(one, two, strict=True)) == [("b", "q"), ("c", "r"), ("d", "s")]
    assert [stream.result.finish_reason for stream in (one, two)] == ["length"] * 2


def test_whoever_waits_moves_the_other_on(llm):
    steps = llm.engine.stats.steps
    one, two = llm.stream("a", max_new_tokens=5), llm.stream("p", max_new_tokens=5)
    assert list(one) == ["b", "c", "d", "e", "f"]
    assert llm.engine.stats.steps == steps + 5
    assert "".join(two) == "qrstu"
    assert llm.engine.stats.steps == steps + 5


def test_nothing_runs_before_someone_asks(llm):
    steps = llm.engine.stats.steps
    stream = llm.stream("a")
    assert not stream.has_ended
    assert llm.engine.stats.steps == steps


def test_catching_up_waits_for_nothing_and_gives_all_text_since_the_last_time(llm):
    one, two = llm.stream("a"), llm.stream("p")
    steps = llm.engine.stats.steps
    assert one.catch_up() == ""
    assert llm.engine.stats.steps == steps
    for _ in range(3):
        next(two)
    assert one.catch_up() == "bcd"
    assert one.catch_up() == ""
    next(two)
    assert one.catch_up() == "e"
    assert llm.engine.stats.steps == steps + 4
    assert next(one) == "f"
    assert (one.result.text, two.result.text) == ("bcdef", "qrst")


def test_catching_up_sees_the_end(llm):
    one, two = llm.stream("a", max_new_tokens=2), llm.stream("p", max_new_tokens=4)
    two.run()
    assert not one.has_ended
    assert one.catch_up() == "bc"
    assert one.has_ended
    assert one.catch_up() == ""
    assert one.result.finish_reason == "length"


def test_a_closed_stream_is_over_and_its_pages_are_free(llm):
    stream = llm.stream("a")
    next(stream)
    assert llm.engine.stats.running == 1
    stream.close()
    assert_idle(llm)
    assert stream.has_ended
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("b", "abort")


def test_closing_what_has_ended_changes_nothing(llm):
    stream = llm.stream("a", max_new_tokens=2)
    whole = stream.run()
    stream.close()
    assert stream.result == whole
    assert whole.finish_reason == "length"


def test_a_stream_that_nobody_holds_any_more_is_aborted(llm):
    kept, dropped, waiting = llm.stream("a"), llm.stream("p"), llm.stream("x")
    assert [next(kept), next(dropped)] == ["b", "q"]
    assert llm.engine.stats.running == 3
    del dropped, waiting
    gc.collect()
    assert llm.engine.stats.running == 1
    assert next(kept) == "c"
    del kept
    gc.collect()
    assert_idle(llm)


def test_a_stop_string_ends_the_request_and_frees_its_pages_at_once(llm):
    steps = llm.engine.stats.steps
    stream = llm.stream("a", stop="de")
    assert list(stream) == ["b", "c"]
    assert llm.engine.stats.steps == steps + 4
    assert_idle(llm)
    assert stream.result.finish_reason == "stop"


def test_tokens_behind_a_stop_string_are_not_seen(llm):
    stopped, other = llm.stream("a", stop="de"), llm.stream("p", max_new_tokens=9)
    other.run()
    assert stopped.catch_up() == "bc"
    assert_idle(llm)
    assert (stopped.result.text, stopped.result.ids) == ("bc", [*b"bcde"])


def test_an_error_comes_after_the_text_before_it_and_every_time(fragile):
    stream, pieces = fragile.stream("a"), []
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        deque(map(pieces.append, stream))
    assert pieces == ["b", "c", "d", "e"]
    assert_idle(fragile)
    with pytest.raises(FloatingPointError):
        next(stream)
    with pytest.raises(FloatingPointError):
        stream.run()


def test_the_result_of_what_failed_has_the_text_and_the_error(fragile):
    stream = fragile.stream("a", logprobs=0)
    with pytest.raises(FloatingPointError) as caught:
        stream.run()
    result = stream.result
    assert (result.text, result.ids, result.finish_reason) == ("bcde", [*b"bcde"], "error")
    assert result.error is caught.value
    assert len(result.logprobs) == result.usage.completion_tokens == 4


def test_one_that_fails_does_not_touch_another(fragile):
    fails, other = fragile.stream("c"), fragile.stream("p", max_new_tokens=8)
    assert other.run().text == "qrstuvwx"
    assert other.result.error is None
    with pytest.raises(FloatingPointError):
        fails.run()
    assert fails.result.text == "de"


def test_what_the_model_raised_for_all_is_raised_by_every_stream(llm):
    streams = llm.stream("a"), llm.stream("p")
    next(streams[0])
    llm.engine.fail(RuntimeError("the device is gone"))
    assert [stream.catch_up() for stream in streams] == ["", "q"]
    for stream, text in zip(streams, "bq", strict=True):
        with pytest.raises(RuntimeError, match="the device is gone"):
            next(stream)
        assert (stream.result.text, stream.result.finish_reason) == (text, "error")


def test_a_stream_ends_where_its_request_was_aborted(tmp_path):
    llm = load(alphabet_checkpoint(tmp_path))
    stream = llm.stream("a")
    next(stream)
    llm.engine.close()
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("b", "abort")
    assert stream.result.error is None


def test_what_of_the_prompt_was_in_the_cache_is_told(llm):
    llm.engine.forget_prefixes()
    first = llm.stream("ab" * 70, max_new_tokens=2).run()  # 141 tokens with a bos
    again = llm.stream("ab" * 70, max_new_tokens=2).run()
    longer = llm.stream("ab" * 70 + "c", max_new_tokens=2).run()
    other = llm.stream("ba" * 70, max_new_tokens=2).run()
    cached = [result.usage.cached_tokens for result in (first, again, longer, other)]
    assert cached == [0, 128, 128, 0]
    assert again.usage.prompt_tokens == 141
    assert again.text == first.text


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_asking_for_the_result_ends_what_still_runs(llm, pieces):
    stream = llm.stream("a")
    for _ in range(pieces):
        next(stream)
    assert (stream.result.text, stream.result.finish_reason) == ("bcd"[:pieces], "abort")
    assert_idle(llm)
