"""Which graph is compiled: for all linears that are needed, with tiles that suit the ranks, and sums if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from ovms_lora.adapters.adapter import BaseLinears, LinearShape
from ovms_lora.adapters.store import Registered
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.errors import AdapterError
from ovms_lora.engine.graph_source import CompiledGraph, GraphSource, LoraTargets
from ovms_lora.engine.lora_graphs import LoraGraphs
from tests.engine.fake_tiles import FakeTiles
from tests.engine.toy_graph import SHAPES, adapter


class Recorder:
    """Graph source, engine and runner that remember what was compiled and adopted."""

    affords_plain = False
    linears = BaseLinears({path: LinearShape(*shape) for path, shape in SHAPES.items()}, "head")

    def __init__(self) -> None:
        self.compiled: list[LoraTargets] = []
        self.adopted: list[CompiledGraph] = []

    def compile(self, targets: LoraTargets) -> CompiledGraph:
        self.compiled.append(targets)
        return CompiledGraph(cast(Any, None), cast(Any, FakeTiles(targets.width)), 7)

    def adopt(self, graph: CompiledGraph, *, keep_plain: bool) -> None:
        del keep_plain
        self.adopted.append(graph)

    def call(self, work: Any) -> Any:
        return work()


def entry(alias: str, rank: int, *paths: str) -> Registered:
    made = adapter(dict.fromkeys(paths or ("m.q",), rank), seed=hash(alias) % 1000)
    return Registered.of(alias, Path(alias), made, alpha=1.0, pinned=False)


def started(*entries: Registered, sums: bool = False, **options: Any) -> tuple[LoraGraphs, Recorder]:
    recorder = Recorder()
    graphs = LoraGraphs(cast(GraphSource, recorder), LoraOptions(**options), "f32")
    graphs.compile(entries, sums=sums)
    graphs.attach(cast(Any, recorder), cast(Any, recorder))
    return graphs, recorder


@pytest.mark.parametrize(
    ("ranks", "width"),
    [((4,), 16), ((8, 16, 2), 16), ((32, 32), 32), ((64,), 64), ((16, 16, 16, 64), 16), ((24, 64), 32), ((256,), 256)],
)
def test_tiles_suit_the_ranks(ranks: tuple[int, ...], width: int) -> None:
    _, recorder = started(*(entry(f"a{index}", rank) for index, rank in enumerate(ranks)))
    (targets,) = recorder.compiled
    assert (targets.width, targets.sums) == (width, max(ranks) > width)


def test_only_other_linears_need_another_graph() -> None:
    first, second = entry("a", 8), entry("b", 8)
    graphs, recorder = started(first)
    graphs.cover([first, second])
    assert not recorder.adopted
    graphs.cover([first, second, entry("c", 8, *SHAPES)])
    assert recorder.compiled[-1].paths == set(SHAPES)
    assert len(recorder.adopted) == 1


def test_with_all_linears_no_adapter_needs_another_graph() -> None:
    graphs, recorder = started(linears="all")
    assert recorder.compiled[-1].paths == SHAPES.keys()
    graphs.cover([entry("a", 8, *SHAPES), entry("b", 4)])
    assert not recorder.adopted


def test_a_request_with_several_adapters_needs_sums_once() -> None:
    graphs, recorder = started(entry("a", 8))
    for _ in range(3):
        graphs.allow_sums()
    assert [targets.sums for targets in recorder.compiled] == [False, True]


def test_what_runs_without_an_alias_still_fits() -> None:
    large, small = entry("a", 32), entry("b", 8, "m.v")
    graphs, recorder = started(large)
    assert not recorder.compiled[-1].sums
    graphs.cover([small])  # a sequence may still use the large one, which needs two of the new tiles
    assert (recorder.compiled[-1].width, recorder.compiled[-1].sums) == (16, True)


def test_the_total_rank_follows_what_is_registered() -> None:
    entries = [entry(f"a{index}", 8) for index in range(4)]
    graphs, _ = started(*entries[:1], max_loras=3)
    assert graphs.residency.total_rank == 8
    graphs.cover(entries)
    assert graphs.residency.total_rank == 24


def test_a_fixed_total_rank_stays() -> None:
    graphs, _ = started(entry("a", 8), total_rank=12)
    graphs.cover([entry("a", 8), entry("b", 8)])
    assert graphs.residency.total_rank == 12
    with pytest.raises(AdapterError, match="greater than total_rank 12"):
        graphs.check_rank(13)
