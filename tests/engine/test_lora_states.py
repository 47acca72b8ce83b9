"""Writing into rank rows: those rows, completely, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ovms_lora.engine.lora_states import LoraStates
from tests.engine.lora_models import LINEARS, Ask, Bases, drift, log_probabilities, prompt, serving
from tests.engine.toy_graph import SHAPES, Toy, adapter, state, toy

NAMES = ["lora_A.m.q+m.v", "lora_A.m.o", "lora_A.head", *(f"lora_B.{path}" for path in SHAPES)]


@pytest.fixture(params=["f32", "bf16"])
def made(request: pytest.FixtureRequest) -> Iterator[Toy]:
    yield toy(dtype=request.param)


def content(made: Toy) -> dict[str, np.ndarray[Any, Any]]:
    return {name: state(made, name) for name in sorted(each.name for each in made.request.query_state())}


def same(one: dict[str, np.ndarray[Any, Any]], other: dict[str, np.ndarray[Any, Any]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def a_of(made: Toy, path: str) -> np.ndarray[Any, Any]:
    """A of one layer, [total rank, in]."""
    group = next(group for group in made.layout.groups if path in group.paths)
    begin = group.paths.index(path) * made.layout.total_rank
    return state(made, group.a)[:, begin : begin + made.layout.total_rank].T


def test_states_begin_empty(made: Toy) -> None:
    assert all(not values.any() for values in content(made).values())


def test_an_adapter_stands_in_its_rows_scaled(made: Toy) -> None:
    some = adapter({"m.q": 2, "m.v": 3, "head": 1}, scaling=3.0)
    rows = np.array([1, 6, 4])
    made.states.write(rows, some)
    for path, pair in some.layers.items():
        found_a, found_b = a_of(made, path), state(made, f"lora_B.{path}")
        rough = 0 if made.layout.dtype == "f32" else 2.0**-8
        np.testing.assert_allclose(found_a[rows[: pair.rank]], pair.a, rtol=rough)
        np.testing.assert_allclose(found_b[rows[: pair.rank]], pair.b.T * np.float32(3), rtol=rough)
        others = np.setdiff1d(np.arange(8), rows[: pair.rank])
        assert not found_a[others].any() and not found_b[others].any()
    assert not a_of(made, "m.o").any() and not state(made, "lora_B.m.o").any()


def test_neighbours_are_left_alone(made: Toy) -> None:
    made.states.write(np.array([0, 2]), adapter(dict.fromkeys(SHAPES, 2), seed=1))
    before = content(made)
    made.states.write(np.array([1, 7, 3]), adapter(dict.fromkeys(SHAPES, 3), seed=2))
    for path in SHAPES:
        assert not np.array_equal(state(made, f"lora_B.{path}"), before[f"lora_B.{path}"])
        np.testing.assert_array_equal(state(made, f"lora_B.{path}")[[0, 2]], before[f"lora_B.{path}"][[0, 2]])


def test_nothing_is_left_of_who_stood_there_before(made: Toy) -> None:
    rows = np.array([5, 0, 2])
    made.states.write(rows, adapter(dict.fromkeys(SHAPES, 3), seed=1))
    some = adapter({"m.v": 1, "m.o": 2}, seed=2)
    made.states.write(rows, some)
    fresh = toy(dtype=made.layout.dtype)
    fresh.states.write(rows, some)
    assert same(content(made), content(fresh))


class CopyingState:
    """A state of a device that gives copies and wants them set again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sets = 0
        self._values = np.zeros(0, np.float32)

    @property
    def state(self) -> ov.Tensor:
        return ov.Tensor(self._values.copy())

    @state.setter
    def state(self, tensor: ov.Tensor) -> None:
        self.sets += 1
        self._values = tensor.data.copy()


class CopyingRequest:
    def __init__(self, names: list[str]) -> None:
        self.states = [CopyingState(name) for name in names]

    def query_state(self) -> list[CopyingState]:
        return self.states


def test_a_device_that_gives_copies_is_written_to_as_well() -> None:
    near = toy()
    request = CopyingRequest([each.name for each in near.request.query_state()])
    far = LoraStates(request, near.layout)
    some = adapter(dict.fromkeys(SHAPES, 3))
    for states in (near.states, far):
        states.write(np.array([1, 2, 6]), some)
    for each in request.states:
        np.testing.assert_array_equal(each.state.data, state(near, each.name))


def test_states_in_bf16_drift_a_little(bases: Bases, tmp_path: Path) -> None:
    llama = bases.get("llama")
    folder = llama.adapter(tmp_path / "x", target_modules=[*LINEARS, "lm_head"], r=16, lora_alpha=16)
    ask = Ask(prompt(40), max_tokens=9, logprobs=20, prompt_logprobs=20)
    found = {}
    for dtype in ("f32", "bf16"):
        with serving(llama.folder, {"x": folder}, lora_dtype=dtype) as model:
            assert model.lora.dtype == dtype
            (answer,) = model.together(replace(ask, adapters=model.lora.select("x")))
        oracle = log_probabilities(llama.with_peft((folder, 1.0)), [*ask.prompt, *answer.token_ids])
        found[dtype] = drift(answer, ask.prompt, oracle)
    print(f"largest difference of a log-probability from PEFT: {found}")
    assert found["f32"] < 0.001 < found["bf16"] <= 0.3
