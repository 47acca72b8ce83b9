"""A device that refuses memory or fails: typed errors without its words, and nothing half-done stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.core.errors import EngineError, NoMemoryError
from ovms_lora.engine.bound_graph import BoundGraph
from ovms_lora.engine.device import device_error
from ovms_lora.engine.lora_states import LoraStates, TileIndices
from ovms_lora.engine.residency import LoraResidency
from ovms_lora.engine.runner import OpenVinoRunner
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence
from tests.engine.fake_tiles import FakeTiles
from tests.engine.harness import request
from tests.engine.test_residency import ADAPTERS, sequence
from tests.engine.toy_graph import SHAPES, Toy, adapter, state, toy


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), NoMemoryError),
        (RuntimeError("std::bad_alloc"), NoMemoryError),
        (RuntimeError("bad alloc"), NoMemoryError),
        (RuntimeError("bad allocation"), NoMemoryError),
        (RuntimeError("Check 'ptr' failed at src/inference/x.cpp:12: failed to allocate memory"), NoMemoryError),
        (RuntimeError("[GPU] out of GPU resources: CL_OUT_OF_HOST_MEMORY"), NoMemoryError),
        (RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:79: shapes differ"), EngineError),
    ],
)
def test_what_a_device_says_is_the_cause_and_not_the_message(error: Any, kind: type[EngineError]) -> None:
    told = device_error(error, "a step")
    assert type(told) is kind
    assert told.message in {"no memory for a step", "the device failed in a step"}


class Request:
    """An infer request that fails to begin, or to take a tensor."""

    model_inputs = (
        SimpleNamespace(
            any_name="value_cache.0",
            partial_shape=ov.PartialShape([-1, 1, 4, 2]),
            element_type=ov.Type.f32,
        ),
    )

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.refused = ""
        self.tensors: dict[str, Any] = {}

    def set_tensor(self, name: str, tensor: ov.Tensor) -> None:
        if name == self.refused:
            self.refused = ""
            raise MemoryError
        self.tensors[name] = tensor.data

    def start_async(self) -> None:
        if self.error:
            raise self.error

    def wait(self) -> None:
        pass

    def get_output_tensor(self, _: int) -> Any:
        return SimpleNamespace(data=np.zeros((1, 16), np.float32))


def runner_on(infer: Request) -> OpenVinoRunner:
    graph = SimpleNamespace(request=infer, tiles=None, vocab_size=16)
    options: Any = SimpleNamespace(cache_size=0, max_num_seqs=2)
    return OpenVinoRunner(graph, options, max_model_len=16)  # type: ignore[arg-type]


def chunk() -> Chunk:
    some = Sequence(request(prompt="abc"), 0)
    some.blocks = [0]
    return Chunk(some, 0, 3, 1)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_a_step_without_memory_is_a_typed_error_and_the_next_one_runs(error: Exception) -> None:
    infer = Request()
    runner = runner_on(infer)
    infer.error = error
    with pytest.raises(NoMemoryError):
        runner.run([chunk()])
    infer.error = None
    assert runner.run([chunk()]).shape == (1, 16)


def test_an_input_that_was_refused_is_set_again() -> None:
    infer = Request()
    runner = runner_on(infer)
    infer.refused = "position_ids"
    with pytest.raises(NoMemoryError):
        runner.run([chunk()])
    assert "position_ids" not in infer.tensors
    runner.run([chunk()])
    assert infer.tensors["position_ids"].tolist() == [0, 1, 2]
    assert isinstance(runner._graph, BoundGraph)


class ScarceTiles(FakeTiles):
    """Tiles whose memory runs out on command."""

    grows, writes = True, True

    def resize(self, count: int) -> None:
        if count > self.count and not self.grows:
            raise MemoryError
        super().resize(count)

    def write(self, tiles: TileIndices, adapter: Adapter) -> None:
        if not self.writes:
            raise RuntimeError("bad allocation")
        super().write(tiles, adapter)


@pytest.mark.parametrize("what", ["grows", "writes"])
def test_adapters_that_find_no_memory_hold_nothing(what: str) -> None:
    tiles = ScarceTiles()
    residency = LoraResidency(tiles, total_rank=16, max_loras=4)
    first, both = sequence(("a", 1.0), name="1"), sequence(("a", 1.0), ("b", 1.0), ("c", 1.0), name="2")
    assert residency.acquire(first)
    setattr(tiles, what, False)
    with pytest.raises(NoMemoryError):
        residency.acquire(both)
    assert both.tiles is None
    setattr(tiles, what, True)
    assert residency.acquire(both)
    for each in (first, both):
        residency.release(each)
    assert all(not resident.holders for resident in residency._residents.values())
    places = [tile for digest in "abc" for tile in tiles.tiles(digest)]
    assert sorted([*places, *residency._free]) == list(range(tiles.count))


def test_a_graph_that_cannot_take_the_residents_leaves_them_where_they_are() -> None:
    tiles, other = FakeTiles(), ScarceTiles(width=4)
    residency = LoraResidency(tiles, total_rank=16, max_loras=4)
    held = sequence(("b", 1.0), ("c", 1.0))
    residency.acquire(held)
    before = held.tiles
    other.writes = False
    with pytest.raises(RuntimeError):
        residency.move(other)
    assert held.tiles == before
    residency.release(held)
    assert residency.acquire(sequence(("d", 1.0), name="2"))
    assert tiles.tiles("d")
    assert {len(tiles.tiles(digest)) for digest in "b"} == {-(-ADAPTERS["b"].max_rank // tiles.width)}


@pytest.fixture
def made() -> Iterator[Toy]:
    yield toy(dtype="f32")


@pytest.mark.parametrize("fails_at", range(6))
def test_states_that_grew_in_part_grow_or_shrink_to_what_is_asked(
    made: Toy, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.states.resize(2)
    some = adapter(dict.fromkeys(SHAPES, 2), seed=1)
    made.states.write(np.array([1]), some)
    names = sorted(each.name for each in made.request.query_state())
    before = {name: state(made, name) for name in names}
    really, calls = LoraStates._tensor, 0

    def scarce(self: LoraStates, shape: list[int]) -> ov.Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise MemoryError
        return really(self, shape)

    monkeypatch.setattr(LoraStates, "_tensor", scarce)
    try:
        made.states.resize(5)
    except MemoryError:
        made.states.resize(2)
    else:
        made.states.resize(2)
    for name in names:
        np.testing.assert_array_equal(state(made, name), before[name])
