"""Metrics of runtime adapters (contract section 9).

Owns their names and labels. An alias becomes a label once an adapter was loaded under it, and at most 1024 do; others
share the label `_other`, which is no alias.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.engine.loading_path import BucketPath, LoadingPath

if TYPE_CHECKING:
    from ovms_lora.server.registry import ModelRegistry

OTHER = "_other"
MAX_LABELS = 1024

_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class LoraMetrics:
    """What adapters are used for, and how often they are loaded."""

    def __init__(self, models: ModelRegistry, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        self.requests = counter("ovms_lora_requests", "Requests by adapter or composite", "adapter")
        self.token_counts = counter("ovms_lora_tokens", "Tokens by adapter and kind", "adapter", "kind")
        self.loads = counter("ovms_lora_loads", "Loads by clients or on demand", "adapter", "result")
        self.load_seconds = Histogram(
            "ovms_lora_load_seconds", "Time of a load in seconds", buckets=_LOAD_BUCKETS, registry=registry
        )
        self.running: Counts[tuple[str, str]] = Counts()
        self.waiting: Counts[tuple[str, str]] = Counts()
        self._labels: set[str] = set()
        registry.register(_Runtimes(models, self))

    def begin(self, model: str, adapters: Sequence[str], prompt_tokens: int) -> LoraCall:
        """Begin to measure one call that uses loaded adapters."""
        return LoraCall(self, model, [self.label(alias) for alias in adapters], prompt_tokens)

    @contextlib.contextmanager
    def loading(self, alias: str, *, is_known: bool) -> Iterator[None]:
        """Measure one load; that of a name nobody knows becomes a label only when it succeeds."""
        begun = time.perf_counter()
        try:
            yield
        except OvmsLoraError:
            failed = alias if is_known or alias in self._labels else OTHER
            self.loads.labels(failed, "error").inc()
            raise
        self.loads.labels(self.label(alias), "ok").inc()
        self.load_seconds.observe(time.perf_counter() - begun)

    def label(self, alias: str) -> str:
        """Return the label of a loaded adapter."""
        if alias not in self._labels and len(self._labels) >= MAX_LABELS:
            return OTHER
        self._labels.add(alias)
        return alias


class LoraCall:
    """The adapters' part in one call: it waits until its first token, then runs until its end."""

    def __init__(self, metrics: LoraMetrics, model: str, labels: Sequence[str], prompt_tokens: int) -> None:
        self._metrics = metrics
        self._keys = [(model, label) for label in labels]
        self._state = metrics.waiting
        self._state.update(self._keys)
        for label in labels:
            metrics.requests.labels(label).inc()
            metrics.token_counts.labels(label, "prompt").inc(prompt_tokens)

    def tokens(self, count: int) -> None:
        """Note generated tokens."""
        if self._state is self._metrics.waiting:
            self.end()
            self._state = self._metrics.running
            self._state.update(self._keys)
        for _, label in self._keys:
            self._metrics.token_counts.labels(label, "generation").inc(count)

    def end(self) -> None:
        """Note that it waits or runs no more."""
        self._state.subtract(self._keys)


class _Runtimes(Collector):
    """What the runtimes hold, read when the metrics are."""

    def __init__(self, models: ModelRegistry, metrics: LoraMetrics) -> None:
        self._models = models
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Give the resident adapters, and vLLM's line about adapters in requests."""
        resident = GaugeMetricFamily(
            "ovms_lora_resident", "Whether an adapter is in the graph's LoRA state", labels=("adapter",)
        )
        brought_in = CounterMetricFamily(
            "ovms_lora_brought_in", "Adapters brought into the graph for a request", labels=("model_name",)
        )
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        requests = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of running and waiting requests", labels=labels
        )
        loras = [(s.name, s.model.lora, s.spec.lora) for s in self._models.served]
        max_loras, shown = 0, 0
        for name, lora, config in loras:
            if lora is None or config is None:
                continue
            brought_in.add_metric((name,), lora.graphs.brought_in)
            max_loras += config.options.max_loras
            for card in lora.cards():
                if not card.components and shown < MAX_LABELS:
                    shown += 1
                    resident.add_metric((card.alias,), float(card.resident))
        if max_loras:
            states = (self._metrics.running, self._metrics.waiting)
            requests.add_metric((str(max_loras), *map(_listed, states)), time.time())
        yield resident
        yield brought_in
        yield requests
        yield from _downloads(lora.loading_path for _, lora, _ in loras if lora is not None)


def _downloads(paths: Iterable[LoadingPath | None]) -> Iterator[Metric]:
    """Give what came from buckets, and what the local cache holds of it."""
    sources = [path.source for path in paths if isinstance(path, BucketPath)]
    downloads = CounterMetricFamily("ovms_lora_downloads", "Adapters fetched from buckets", labels=("result",))
    downloads.add_metric(("ok",), sum(source.counts.succeeded for source in sources))
    downloads.add_metric(("error",), sum(source.counts.failed for source in sources))
    yield downloads
    fetched = sum(source.counts.nbytes for source in sources)
    yield CounterMetricFamily("ovms_lora_download_bytes", "Bytes of adapters fetched from buckets", fetched)
    kept = {source.cache.folder: source.cache.nbytes for source in sources}
    yield GaugeMetricFamily("ovms_lora_cache_bytes", "Bytes of adapters in the local cache", sum(kept.values()))


def _listed(counts: Counts[tuple[str, str]]) -> str:
    return ",".join(sorted({label for (_, label), count in counts.copy().items() if count > 0}))
