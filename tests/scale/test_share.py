"""Replicas of one machine share its processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.scale import replica


@pytest.mark.parametrize(
    ("device", "graph", "given", "expected"),
    [
        (None, {}, {}, {"INFERENCE_NUM_THREADS": 3, "ENABLE_CPU_PINNING": False}),
        (None, {"ENABLE_CPU_PINNING": True}, {}, {"INFERENCE_NUM_THREADS": 3, "ENABLE_CPU_PINNING": True}),
        ("CPU", {}, {"INFERENCE_NUM_THREADS": 1}, {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}),
        ("GPU", {"A": 1}, {"A": 2}, {"A": 2}),
    ],
)
def test_a_replica_computes_on_its_share_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    device: str | None,
    graph: dict[str, Any],
    given: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    loaded: dict[str, Any] = {}
    options = EngineOptions(plugin_config=graph)
    monkeypatch.setattr(replica, "read_options", lambda folder, graph_path: (folder, options))
    monkeypatch.setattr(replica, "load_model", lambda folder, **arguments: loaded.update(arguments))
    replica.load_on_share(3, Path("m"), graph_path=None, device=device, plugin_config=given, lora=None)
    assert loaded == {"graph_path": None, "device": device, "plugin_config": expected, "lora": None}
