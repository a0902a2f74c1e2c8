"""What Prometheus may ask: how much is done, how long it takes, how full the cache is."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama32.engine.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
TOKENS = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5)


class Metrics:
    """Of one server. The engine counts for itself and is asked when someone looks."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.responses = self._counter("responses", "Responses of the server", "path", "status")
        self.completions = self._counter("completions", "What ended them", "finish_reason")
        self.first_token = self._histogram("first_token_seconds", "Until it came", SECONDS)
        self.seconds = self._histogram("request_seconds", "Until a request's end", SECONDS)
        self.prompt = self._histogram("prompt_tokens", "Of a request", TOKENS)
        self.generated = self._histogram("completion_tokens", "Of a request", TOKENS)
        self.registry.register(EngineCollector(engine))

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"llama32_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"llama32_{name}", about, registry=self.registry, buckets=buckets)

    def text(self) -> bytes:
        """All, in Prometheus' own format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Asks an engine, which may have to end its step first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """What there is to know now."""
        stats = self._engine.stats
        counted = {
            "steps": (stats.steps, "Steps of the engine"),
            "prompt_tokens_computed": (stats.prompt_computed, "Prompt tokens that were computed"),
            "prompt_tokens_cached": (stats.prompt_cached, "Prompt tokens found in the cache"),
            "generated_tokens": (stats.generated, "Tokens generated"),
            "drafted_tokens": (stats.drafted, "Tokens drafted"),
            "accepted_tokens": (stats.accepted, "Drafts that were right"),
            "preemptions": (stats.preemptions, "Requests sent back to wait for pages"),
        }
        for name, (value, about) in counted.items():
            yield CounterMetricFamily(f"llama32_{name}", about, value=value)
        gauged = {
            "requests_running": (stats.running, "Requests in the batch"),
            "requests_waiting": (stats.waiting, "Requests that wait for a place in it"),
            "cache_pages": (stats.pages, "Pages of the KV cache"),
            "cache_pages_held": (stats.pages_held, "Pages that running requests hold"),
            "cache_pages_idle": (stats.pages_idle, "Pages that are remembered and can be taken"),
        }
        for name, (value, about) in gauged.items():
            yield GaugeMetricFamily(f"llama32_{name}", about, value=value)

    def describe(self) -> Iterable[Metric]:
        """Nothing before it is asked: the engine may be busy."""
        return ()
