"""Prometheus metrics: work done, latencies, how full the cache is."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama32.engine.engine import Engine

SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
TOKEN_BUCKETS = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5)


class Metrics:
    """Metrics of a server, in a registry separate from other servers."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.responses = self._counter(
            "responses", "HTTP responses by route and status", "path", "status"
        )
        self.completions = self._counter(
            "completions", "Completions by the reason for their end", "finish_reason"
        )
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "Seconds until the first token of a request", SECONDS_BUCKETS
        )
        self.request_seconds = self._histogram(
            "request_seconds", "Seconds until the end of a request", SECONDS_BUCKETS
        )
        self.prompt_tokens = self._histogram(
            "prompt_tokens", "Prompt tokens of a completion", TOKEN_BUCKETS
        )
        self.completion_tokens = self._histogram(
            "completion_tokens", "Generated tokens of a completion", TOKEN_BUCKETS
        )
        self.registry.register(EngineCollector(engine))

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"llama32_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"llama32_{name}", help_text, registry=self.registry, buckets=buckets)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Reads the engine's counters when Prometheus scrapes the server.

    A scrape waits until the engine's current step has ended.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Yield the current counters and gauges of the engine."""
        stats = self._engine.stats
        counters = {
            "steps": (stats.steps, "Steps of the engine"),
            "prompt_tokens_computed": (
                stats.prompt_computed,
                "Prompt tokens that the model computed",
            ),
            "prompt_tokens_cached": (stats.prompt_cached, "Prompt tokens found in the KV cache"),
            "generated_tokens": (stats.generated, "Generated tokens"),
            "drafted_tokens": (stats.drafted, "Draft tokens proposed for verification"),
            "accepted_tokens": (stats.accepted, "Draft tokens that the model accepted"),
            "preemptions": (stats.preemptions, "Requests preempted because pages ran out"),
        }
        for name, (value, help_text) in counters.items():
            yield CounterMetricFamily(f"llama32_{name}", help_text, value=value)
        gauges = {
            "requests_running": (stats.running, "Requests in the running batch"),
            "requests_waiting": (stats.waiting, "Requests waiting to enter the running batch"),
            "cache_pages": (stats.pages, "Pages of the KV cache"),
            "cache_pages_held": (stats.pages_held, "Pages that running requests use"),
            "cache_pages_evictable": (
                stats.pages_evictable,
                "Pages that no request uses, kept for later requests until evicted",
            ),
            "cache_pages_idle": (
                stats.pages_evictable,
                "Deprecated, removed in release 0.3: use llama32_cache_pages_evictable",
            ),
        }
        for name, (value, help_text) in gauges.items():
            yield GaugeMetricFamily(f"llama32_{name}", help_text, value=value)

    def describe(self) -> Iterable[Metric]:
        """Return no metrics, because registration must not wait for a busy engine."""
        return ()
