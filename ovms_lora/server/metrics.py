"""Metrics of one server (contract section 9), in a registry of its own.

Owns names and labels. A label holds only names of models that are served; clients cannot add any.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ovms_lora.core.errors import QueueFullError, UnavailableError
from ovms_lora.server.disconnect import ClientGoneError
from ovms_lora.server.lora_metrics import LoraMetrics

if TYPE_CHECKING:
    from ovms_lora.core.request import SequenceOutput
    from ovms_lora.server.lora_metrics import LoraCall
    from ovms_lora.server.registry import ModelRegistry

_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_GRAPH_BUCKETS = tuple(10.0**power for power in range(2, 10))


class _PlainCounters(Collector):
    """OVMS's counters: prometheus_client would append `_total` to their names, which OVMS's readers do not expect."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._counts: Counts[tuple[str, ...]] = Counts()

    def add(self, *labels: str) -> None:
        """Count one."""
        self._counts[labels] += 1

    def collect(self) -> Iterator[Metric]:
        """Give the counts."""
        metric = Metric(self._name, self._documentation, "unknown")
        for labels, count in self._counts.copy().items():
            metric.add_sample(self._name, dict(zip(self._labels, labels, strict=True)), count)
        yield metric


class _Engines(Collector):
    """What the engines count themselves, read when the metrics are."""

    _GAUGES = (
        ("vllm:num_requests_running", "Sequences that are being computed", "running"),
        ("vllm:num_requests_waiting", "Requests that wait", "waiting"),
        ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", "kv_cache_usage"),
    )
    _COUNTERS = (
        ("vllm:prompt_tokens", "Prompt tokens", "prompt_tokens"),
        ("vllm:generation_tokens", "Generated tokens", "generation_tokens"),
        ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", "prefix_cache_queries"),
        ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", "prefix_cache_hits"),
        ("vllm:num_preemptions", "Preempted sequences", "preemptions"),
    )

    # Of models that guess ahead only.
    _SPECULATION = (
        ("vllm:spec_decode_num_drafts", "Guesses that were checked", "drafts"),
        ("vllm:spec_decode_num_draft_tokens", "Guessed tokens that were checked", "draft_tokens"),
        ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that proved right", "accepted_tokens"),
    )

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Give the engines' numbers by model."""
        stats = [(served.name, served.model.engine.stats()) for served in self._models.served]
        guessing = [(model, values.speculation) for model, values in stats if values.speculation]
        for kind, rows, source in (
            (GaugeMetricFamily, self._GAUGES, stats),
            (CounterMetricFamily, self._COUNTERS, stats),
            (CounterMetricFamily, self._SPECULATION, guessing),
        ):
            for name, documentation, attribute in rows:
                family = kind(name, documentation, labels=("model_name",))
                for model, values in source:
                    family.add_metric((model,), getattr(values, attribute))
                yield family


class Metrics:
    """All metrics of one server."""

    def __init__(self, models: ModelRegistry) -> None:
        self._registry = registry = CollectorRegistry()
        requests = ("api", "interface", "method", "name")
        self.accepted = _PlainCounters("ovms_requests_accepted", "Requests taken", requests)
        self.rejected = _PlainCounters("ovms_requests_rejected", "Requests refused for want of room", requests)
        self.responses = _PlainCounters("ovms_responses", "Answers given", requests)
        self.graph_error = _PlainCounters("ovms_graph_error", "Requests that failed", requests)
        for collector in (self.accepted, self.rejected, self.responses, self.graph_error, _Engines(models)):
            registry.register(collector)
        self.current = Gauge("ovms_current_graphs", "Requests at work", ("name",), registry=registry)
        self.processing = Histogram(
            "ovms_graph_processing_time_us",
            "Time of a request in microseconds",
            ("method", "name"),
            buckets=_GRAPH_BUCKETS,
            registry=registry,
        )
        self.first_token = self._latency("vllm:time_to_first_token_seconds", "Time to the first token")
        self.inter_token = self._latency("vllm:inter_token_latency_seconds", "Time between tokens", _TOKEN_BUCKETS)
        self.lora = LoraMetrics(models, registry)
        self.whole = self._latency("vllm:e2e_request_latency_seconds", "Time of a whole request")

    def _latency(self, name: str, documentation: str, buckets: Sequence[float] = _LATENCY_BUCKETS) -> Histogram:
        return Histogram(name, documentation, ("model_name",), buckets=buckets, registry=self._registry)

    def begin(self, api: str, model: str, *, streamed: bool) -> CallMetrics:
        """Begin to measure one call of a served model."""
        return CallMetrics(self, api, model, "Stream" if streamed else "Unary")

    def refuse(self, api: str, model: str) -> None:
        """Note a call that was refused by its head: whether it wants a stream was not read."""
        self.rejected.add(api, "REST", "Unary", model)

    def exposition(self) -> bytes:
        """Return everything in Prometheus's text format; may wait for a runtime's lock."""
        return generate_latest(self._registry)


class CallMetrics:
    """The measures of one call; `end` it once, later ends do nothing."""

    def __init__(self, metrics: Metrics, api: str, model: str, method: str) -> None:
        self._metrics = metrics
        self._model = model
        self._method = method
        self._labels = (api, "REST", method, model)
        self._begun = self._last = time.perf_counter()
        self._first_token = metrics.first_token.labels(model)
        self._inter_token = metrics.inter_token.labels(model)
        self._seen_first = False
        self._ended = False
        self._adapters: LoraCall | None = None
        metrics.current.labels(model).inc()

    def use(self, adapters: Sequence[str], prompt_tokens: int) -> None:
        """Note the adapters of the call, by alias, once they are loaded."""
        if adapters:
            self._adapters = self._metrics.lora.begin(self._model, adapters, prompt_tokens)

    def tokens(self, outputs: Iterable[SequenceOutput]) -> None:
        """Note that a step has brought something."""
        now = time.perf_counter()
        if count := sum(len(output.token_ids) for output in outputs):
            if self._adapters:
                self._adapters.tokens(count)
            (self._inter_token if self._seen_first else self._first_token).observe(now - self._last)
            self._seen_first = True
            self._last = now

    def end(self, failure: BaseException | None = None) -> None:
        """Note that the call is answered, or why not."""
        if self._ended:
            return
        self._ended = True
        if self._adapters:
            self._adapters.end()
        metrics, seconds = self._metrics, time.perf_counter() - self._begun
        metrics.current.labels(self._model).dec()
        if isinstance(failure, QueueFullError | UnavailableError):
            metrics.rejected.add(*self._labels)
            return
        metrics.accepted.add(*self._labels)
        if failure is None:
            metrics.responses.add(*self._labels)
            metrics.processing.labels(self._method, self._model).observe(seconds * 1e6)
            metrics.whole.labels(self._model).observe(seconds)
        elif isinstance(failure, Exception) and not isinstance(failure, ClientGoneError):
            metrics.graph_error.add(*self._labels)
