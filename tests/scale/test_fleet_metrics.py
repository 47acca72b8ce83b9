"""Metrics of all replicas in one text."""

from __future__ import annotations

import json

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ovms_lora.scale.fleet_metrics import merged


def exposition(requests: int) -> bytes:
    registry = CollectorRegistry()
    Counter("asked", "Requests", ("name",), registry=registry).labels("sql").inc(requests)
    Histogram("took", "Seconds", registry=registry, buckets=(1.0,)).observe(0.5)
    return generate_latest(registry)


def test_every_sample_says_of_which_replica_it_is() -> None:
    text = merged([("a", exposition(2)), ("b", exposition(3))]).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {
        (s.name, json.dumps(s.labels, sort_keys=True)): s.value for family in families.values() for s in family.samples
    }
    assert found["asked_total", '{"name": "sql", "replica": "a"}'] == 2
    assert found["asked_total", '{"name": "sql", "replica": "b"}'] == 3
    assert found["took_bucket", '{"le": "1.0", "replica": "b"}'] == 1


def test_a_family_stands_once() -> None:
    text = merged([("a", exposition(2)), ("b", exposition(3))]).decode()
    assert text.count("# TYPE asked_total counter") == 1
    assert text.count("# TYPE took histogram") == 1
