"""Writing into tiles: those tiles, completely, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ovms_lora.engine.lora_rows import SequenceTiles
from ovms_lora.engine.lora_states import LoraStates
from tests.engine.lora_models import LINEARS, Ask, Bases, drift, log_probabilities, prompt, serving
from tests.engine.toy_graph import SHAPES, Toy, adapter, assert_close, expected, state, toy


@pytest.fixture(params=["f32", "bf16"])
def made(request: pytest.FixtureRequest) -> Iterator[Toy]:
    yield toy(dtype=request.param)


def content(made: Toy) -> dict[str, np.ndarray[Any, Any]]:
    return {name: state(made, name) for name in sorted(each.name for each in made.request.query_state())}


def same(one: dict[str, np.ndarray[Any, Any]], other: dict[str, np.ndarray[Any, Any]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def pair_of(made: Toy, path: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A of one layer [S, in, width], and B [S, width, out]."""
    group = next(group for group in made.layout.groups if path in group.paths)
    count, place = made.states.count, group.paths.index(path)
    a = state(made, group.a)[place * count : (place + 1) * count]
    chunks = [chunk for chunk, owner in enumerate(group.owners) if owner == place]
    b = [state(made, group.b)[chunk * count : (chunk + 1) * count] for chunk in chunks]
    return a, np.concatenate(b, axis=2)


def test_states_begin_empty(made: Toy) -> None:
    assert all(not values.any() for values in content(made).values())


def test_an_adapter_stands_in_its_tiles_scaled(made: Toy) -> None:
    some = adapter({"m.q": 2, "m.v": 3, "head": 1}, scaling=3.0)
    tiles = np.array([2, 0])
    made.states.write(tiles, some)
    for path, pair in some.layers.items():
        a, b = pair_of(made, path)
        rough = 0 if made.layout.form.dtype == "f32" else 2.0**-8
        found_a = np.concatenate([a[tile].T for tile in tiles])
        found_b = np.concatenate([b[tile] for tile in tiles])
        np.testing.assert_allclose(found_a[: pair.rank], pair.a, rtol=rough)
        np.testing.assert_allclose(found_b[: pair.rank], pair.b.T * np.float32(3), rtol=rough)
        assert not found_a[pair.rank :].any() and not found_b[pair.rank :].any()
        assert not a[[1, 3]].any() and not b[[1, 3]].any()
    assert not any(each.any() for each in pair_of(made, "m.o"))


def test_neighbours_are_left_alone(made: Toy) -> None:
    made.states.write(np.array([0]), adapter(dict.fromkeys(SHAPES, 2), seed=1))
    before = {path: pair_of(made, path)[1] for path in SHAPES}
    made.states.write(np.array([1, 3]), adapter(dict.fromkeys(SHAPES, 3), seed=2))
    for path in SHAPES:
        after = pair_of(made, path)[1]
        assert not np.array_equal(after, before[path])
        np.testing.assert_array_equal(after[[0, 2]], before[path][[0, 2]])


def test_nothing_is_left_of_who_stood_there_before(made: Toy) -> None:
    tiles = np.array([3, 0])
    made.states.write(tiles, adapter(dict.fromkeys(SHAPES, 3), seed=1))
    some = adapter({"m.v": 1, "m.o": 2}, seed=2)
    made.states.write(tiles, some)
    fresh = toy(dtype=made.layout.form.dtype)
    fresh.states.write(tiles, some)
    assert same(content(made), content(fresh))


def test_what_is_written_between_two_runs_counts_in_the_next(made: Toy) -> None:
    x = np.random.default_rng(3).normal(size=(2, 4)).astype(np.float32)
    for seed in range(4):
        some = adapter(dict.fromkeys(SHAPES, 2), seed=seed, scaling=0.5)
        tile = seed % 2
        made.states.write(np.array([tile]), some)
        found = made.run(x, {0: SequenceTiles(np.array([tile]), np.ones(1, np.float32))})
        assert_close(found, expected(x, [[(some, 1.0)], []]), made.layout.form.dtype)


def test_a_change_of_size_keeps_what_stays(made: Toy) -> None:
    made.states.write(np.array([1]), adapter(dict.fromkeys(SHAPES, 2), seed=1))
    before = {path: pair_of(made, path) for path in SHAPES}
    for count in (9, 2):
        made.states.resize(count)
        for path in SHAPES:
            for found, kept in zip(pair_of(made, path), before[path], strict=True):
                assert len(found) == count
                np.testing.assert_array_equal(found[:2], kept[:2])
                assert not found[2:].any()


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

    def set_tensor(self, name: str, tensor: ov.Tensor) -> None:
        """Inputs are not looked at here."""


def test_a_device_that_gives_copies_is_written_to_as_well() -> None:
    near = toy()
    request = CopyingRequest([each.name for each in near.request.query_state()])
    far = LoraStates(request, near.layout)
    far.resize(4)
    some = adapter(dict.fromkeys(SHAPES, 3))
    for states in (near.states, far):
        states.write(np.array([1, 2]), some)
        states.resize(3)
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
