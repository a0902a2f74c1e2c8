"""The server's metrics, health, and view of the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.llm.loading import load
from llama32.serve.cache_view import CacheView, page_runs
from tests.serving import Served, serving, until

STORY = {"model": "tiny", "prompt": "One day, a dog. " * 16, "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load("tiny", engine=EngineSettings(cache_tokens=16_384, max_running=4))


@pytest.fixture
def served(llm) -> Iterator[Served]:
    with serving(llm) as server:
        yield server
        server.assert_idle()


def complete(served: Served, **changes: Any) -> dict[str, Any]:
    answer = httpx.post(f"{served.url}/v1/completions", json=STORY | changes, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()


@contextmanager
def running(served: Served, count: int, **changes: Any) -> Iterator[list[Thread]]:
    """Run long requests, from their first tokens to the end of the block."""
    long = {"max_tokens": 250, "ignore_eos": True, **changes}
    threads = [Thread(target=complete, args=(served,), kwargs=long) for _ in range(count)]
    for thread in threads:
        thread.start()
    until(lambda: len([r for r in served.engine.scheduler.running if r.output]) >= min(count, 4))
    yield threads
    for thread in threads:
        thread.join()


def metrics(served: Served) -> dict[str, float]:
    text = httpx.get(f"{served.url}/metrics").text
    families = text_string_to_metric_families(text)
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_the_work(served):
    before = metrics(served)
    answer = complete(served)
    complete(served)
    assert httpx.get(f"{served.url}/nowhere").status_code == 404
    after = metrics(served)
    increase = {name: after[name] - before.get(name, 0) for name in after if "created" not in name}
    tokens = answer["usage"]["prompt_tokens"]
    assert increase["llama32_generated_tokens_total"] == 10
    assert increase["llama32_prompt_tokens_cached_total"] >= 64
    assert (
        increase["llama32_prompt_tokens_cached_total"]
        + increase["llama32_prompt_tokens_computed_total"]
        == 2 * tokens
    )
    assert increase["llama32_completions_total length"] == 2
    assert increase["llama32_responses_total /v1/completions 200"] == 2
    assert increase["llama32_responses_total other 404"] == 1
    assert increase["llama32_first_token_seconds_count"] == 2
    assert increase["llama32_prompt_tokens_sum"] == 2 * tokens
    assert after["llama32_requests_running"] == after["llama32_cache_pages_held"] == 0
    assert after["llama32_cache_pages"] == 256


def test_old_and_new_name_of_the_evictable_pages_agree(served):
    complete(served)
    values = metrics(served)
    assert values["llama32_cache_pages_idle"] == values["llama32_cache_pages_evictable"] >= 1
    text = httpx.get(f"{served.url}/metrics").text
    helps = {family.name: family.documentation for family in text_string_to_metric_families(text)}
    assert helps["llama32_cache_pages_idle"].startswith("Deprecated")
    assert "llama32_cache_pages_evictable" in helps["llama32_cache_pages_idle"]
    assert min(len(text.split()) for text in helps.values()) >= 2


def test_each_server_has_metrics_of_its_own(llm):
    with serving(llm) as first:
        complete(first)
        assert metrics(first)["llama32_completions_total length"] == 1
    with serving(llm) as second:
        assert "llama32_completions_total length" not in metrics(second)


def test_the_snapshot_shows_used_and_evictable_pages(served):
    def snapshot() -> dict[str, Any]:
        return httpx.get(f"{served.url}/cache").json()

    empty = snapshot()
    assert (empty["pages"], empty["page_size"], empty["running"]) == (256, 64, [])
    with running(served, 6) as threads:
        until(lambda: len(snapshot()["running"]) == 4)
        seen = snapshot()
        assert seen["waiting"] >= 1
        numbers = [request["number"] for request in seen["running"]]
        assert numbers == sorted(numbers)
        for request in seen["running"]:
            length = request["prompt"] + request["generated"]
            assert sum(count for _, count in request["pages"]) in (length // 64, length // 64 + 1)
            assert request["computed"] in (length - 1, length)
        first = [request["pages"][0][0] for request in seen["running"]]
        assert len({*first}) == 1  # all prompts begin the same way
        assert seen["running"][-1]["cached"] >= 64
        assert any(thread.is_alive() for thread in threads)
    after = snapshot()
    assert (after["running"], after["waiting"]) == ([], 0)
    num_evictable = sum(count for _, count in after["evictable"])
    assert num_evictable == served.engine.stats.pages_evictable >= 1
    assert after["idle"] == after["evictable"]  # the deprecated name


def test_consecutive_pages_form_a_run():
    assert page_runs([]) == []
    assert page_runs([4]) == [(4, 1)]
    assert page_runs([0, 1, 2, 7, 9, 10, 3]) == [(0, 3), (7, 1), (9, 2), (3, 1)]


def test_a_request_keeps_its_number(llm):
    view = CacheView(llm.engine)
    requests = [llm.engine.add([1, 2, 3]) for _ in range(2)]
    llm.engine.step()
    for _ in range(2):
        assert [request["number"] for request in view.snapshot()["running"]] == [1, 2]
    llm.engine.abort(requests[0])
    requests.append(llm.engine.add([4]))
    llm.engine.step()
    assert [request["number"] for request in view.snapshot()["running"]] == [2, 3]
    for request in requests:
        llm.engine.abort(request)


def test_a_stopping_server_is_unhealthy_and_refuses_requests(served):
    assert httpx.get(f"{served.url}/health").status_code == 200
    served.service.is_stopping = True
    answer = httpx.get(f"{served.url}/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
    refused = httpx.post(f"{served.url}/v1/completions", json=STORY)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "the server is shutting down"


def test_the_openapi_document_describes_every_path(served):
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert "`idle` is deprecated" in paths["/cache"]["get"]["description"]
    assert {*paths} == {
        "/health",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/metrics",
        "/cache",
    }
