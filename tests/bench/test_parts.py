"""Every part of the suite runs on a tiny model and gives rows; they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import side_by_side
from bench.engines.process import ENVIRONMENTS
from bench.models import tiny
from bench.part import Part, Plan, Row
from bench.parts import PARTS
from bench.plots import draw
from bench.results import Result, machine
from bench.side_by_side import installed

# What each part tells apart its rows by.
KEYS = {
    "side_by_side": ("case", "batch", "engine"),
    "batches": ("batch", "case"),
    "prefill": ("case",),
    "step_time": ("batch", "case"),
    "roofline": ("batch", "case"),
    "lora_forms": ("batch", "form"),
    "scaling": ("axis", "value", "case"),
    "serving": ("registered", "load"),
    "http_streaming": ("case",),
    "memory": ("case", "registered", "resident"),
    "startup": ("case",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("bench"))


def plan(folder: Path) -> Plan:
    return Plan(folder, rounds=1, tokens=3, batches=(1, 8), registered=(9,), serving_seconds=1.0)


def check_rows(part: str, rows: Sequence[Row]) -> None:
    assert rows
    keys = [tuple(row[name] for name in KEYS[part]) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        numbers = [value for name, value in row.items() if not isinstance(value, str) and name not in KEYS[part]]
        assert numbers and all(math.isfinite(number) and number >= 0 for number in numbers)


def test_all_parts_are_known_here() -> None:
    assert {part.name for part in PARTS} == KEYS.keys()


def test_engines_are_compared_side_by_side(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking_part = [name for name in installed() if name in {"ovms-lora", "genai"}]
    monkeypatch.setattr("bench.side_by_side.installed", lambda: taking_part)
    rows = side_by_side.measure(model, plan(tmp_path))
    check_rows("side_by_side", rows)
    assert {row["engine"] for row in rows} == set(taking_part)
    assert [row["same_first_tokens"] for row in rows if row["case"] == "plain"] == [1.0] * 3 * len(taking_part)
    (plot,) = draw([Result("side_by_side", "tiny", rows, machine())], tmp_path)
    assert plot.stat().st_size > 1000


def test_an_engine_of_another_environment_takes_part_when_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENTS, "vllm", tmp_path)
    assert "vllm" not in installed()
    (tmp_path / ".ready").touch()
    assert "vllm" in installed()


@pytest.mark.parametrize("part", [part for part in PARTS if part.name != "side_by_side"], ids=lambda part: part.name)
def test_a_part_gives_rows_and_they_are_drawn(part: Part, model: Path, tmp_path: Path) -> None:
    rows = part.measure(model, plan(tmp_path))
    check_rows(part.name, rows)
    for path in draw([Result(part.name, "tiny", rows, machine())], tmp_path / "plots"):
        assert path.read_bytes().startswith(b"\x89PNG")
