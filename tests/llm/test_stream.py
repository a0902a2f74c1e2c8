import gc
import math
from collections import deque
from collections.abc import Iterator

import pytest

from llama32.llm.llm import LLM
from llama32.llm.loading import load
from tests.alphabet import alphabet_checkpoint


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = tmp_path_factory.mktemp("alphabet")
    return load(alphabet_checkpoint(folder, max_position_embeddings=1024))


@pytest.fixture
def fragile(llm) -> Iterator[LLM]:
    """A model whose logits are nan after an e."""

    def spoil(_, args, x):
        return x.masked_fill((args[0] == ord("e")).unsqueeze(-1), math.nan)

    handle = llm.model.embed.register_forward_hook(spoil)
    yield llm
    handle.remove()


def assert_idle(llm: LLM) -> None:
    stats = llm.engine.stats
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


def test_two_streams_can_be_read_in_turn(llm):
    first, second = llm.stream("a", max_new_tokens=3), llm.stream("p", max_new_tokens=3)
    assert list(zip(first, second, strict=True)) == [("b", "q"), ("c", "r"), ("d", "s")]
    assert [stream.result.finish_reason for stream in (first, second)] == ["length"] * 2


def test_waiting_for_a_stream_also_advances_the_second(llm):
    steps = llm.engine.stats.steps
    first, second = llm.stream("a", max_new_tokens=5), llm.stream("p", max_new_tokens=5)
    assert list(first) == ["b", "c", "d", "e", "f"]
    assert llm.engine.stats.steps == steps + 5
    assert "".join(second) == "qrstu"
    assert llm.engine.stats.steps == steps + 5


def test_nothing_runs_before_the_first_piece_is_requested(llm):
    steps = llm.engine.stats.steps
    stream = llm.stream("a")
    assert not stream.is_finished
    assert llm.engine.stats.steps == steps


def test_update_returns_the_new_text_without_waiting(llm):
    first, second = llm.stream("a"), llm.stream("p")
    steps = llm.engine.stats.steps
    assert first.update() == ""
    assert llm.engine.stats.steps == steps
    for _ in range(3):
        next(second)
    assert first.update() == "bcd"
    assert first.update() == ""
    next(second)
    assert first.update() == "e"
    assert llm.engine.stats.steps == steps + 4
    assert next(first) == "f"
    assert (first.result.text, second.result.text) == ("bcdef", "qrst")


def test_update_notices_the_end(llm):
    first, second = llm.stream("a", max_new_tokens=2), llm.stream("p", max_new_tokens=4)
    second.run()
    assert not first.is_finished
    assert first.update() == "bc"
    assert first.is_finished
    assert first.update() == ""
    assert first.result.finish_reason == "length"


def test_closing_a_stream_ends_the_request_and_frees_the_pages(llm):
    stream = llm.stream("a")
    next(stream)
    assert llm.engine.stats.running == 1
    stream.close()
    assert_idle(llm)
    assert stream.is_finished
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("b", "abort")


def test_closing_a_finished_stream_changes_nothing(llm):
    stream = llm.stream("a", max_new_tokens=2)
    whole = stream.run()
    stream.close()
    assert stream.result == whole
    assert whole.finish_reason == "length"


def test_a_stream_without_references_is_aborted(llm):
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


def test_a_stop_string_ends_the_request_and_frees_the_pages_at_once(llm):
    steps = llm.engine.stats.steps
    stream = llm.stream("a", stop="de")
    assert list(stream) == ["b", "c"]
    assert llm.engine.stats.steps == steps + 4
    assert_idle(llm)
    assert stream.result.finish_reason == "stop"


def test_tokens_after_a_stop_string_are_dropped(llm):
    stopped, other = llm.stream("a", stop="de"), llm.stream("p", max_new_tokens=9)
    other.run()
    assert stopped.update() == "bc"
    assert_idle(llm)
    assert (stopped.result.text, stopped.result.ids) == ("bc", [*b"bcde"])


def test_an_error_is_raised_after_the_text_and_every_time(fragile):
    stream, pieces = fragile.stream("a"), []
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        deque(map(pieces.append, stream))
    assert pieces == ["b", "c", "d", "e"]
    assert_idle(fragile)
    with pytest.raises(FloatingPointError):
        next(stream)
    with pytest.raises(FloatingPointError):
        stream.run()


def test_a_failed_result_has_the_text_and_the_error(fragile):
    stream = fragile.stream("a", logprobs=0)
    with pytest.raises(FloatingPointError) as caught:
        stream.run()
    result = stream.result
    assert (result.text, result.ids, result.finish_reason) == ("bcde", [*b"bcde"], "error")
    assert result.error is caught.value
    assert len(result.logprobs) == result.usage.completion_tokens == 4


def test_a_failing_stream_does_not_affect_the_second(fragile):
    fails, other = fragile.stream("c"), fragile.stream("p", max_new_tokens=8)
    assert other.run().text == "qrstuvwx"
    assert other.result.error is None
    with pytest.raises(FloatingPointError):
        fails.run()
    assert fails.result.text == "de"


def test_an_engine_failure_is_raised_by_every_stream(llm):
    streams = llm.stream("a"), llm.stream("p")
    next(streams[0])
    llm.engine.fail(RuntimeError("the device is gone"))
    assert [stream.update() for stream in streams] == ["", "q"]
    for stream, text in zip(streams, "bq", strict=True):
        with pytest.raises(RuntimeError, match="the device is gone"):
            next(stream)
        assert (stream.result.text, stream.result.finish_reason) == (text, "error")


def test_a_stream_ends_when_the_request_is_aborted(tmp_path):
    llm = load(alphabet_checkpoint(tmp_path))
    stream = llm.stream("a")
    next(stream)
    llm.engine.close()
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("b", "abort")
    assert stream.result.error is None


def test_usage_counts_cached_prompt_tokens(llm):
    llm.engine.forget_prefixes()
    first = llm.stream("ab" * 70, max_new_tokens=2).run()  # 141 tokens with the begin token
    again = llm.stream("ab" * 70, max_new_tokens=2).run()
    longer = llm.stream("ab" * 70 + "c", max_new_tokens=2).run()
    other = llm.stream("ba" * 70, max_new_tokens=2).run()
    cached = [result.usage.cached_tokens for result in (first, again, longer, other)]
    assert cached == [0, 128, 128, 0]
    assert again.usage.prompt_tokens == 141
    assert again.text == first.text


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_reading_the_result_ends_a_running_request(llm, pieces):
    stream = llm.stream("a")
    for _ in range(pieces):
        next(stream)
    assert (stream.result.text, stream.result.finish_reason) == ("bcd"[:pieces], "abort")
    assert_idle(llm)
