"""The metrics of all replicas as one text in Prometheus's format: every sample gets the label `replica`.

Owns the merging. Sums are Prometheus's business: a replica's counters end with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_LABEL = "replica"


def merged(parts: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the metrics of several replicas, each given by its name and its text."""
    families: dict[str, Metric] = {}
    for replica, text in parts:
        for family in text_string_to_metric_families(text.decode("utf-8")):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [sample._replace(labels={**sample.labels, _LABEL: replica}) for sample in family.samples]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    """Metrics that are complete already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        """Give them."""
        return iter(self._families)
