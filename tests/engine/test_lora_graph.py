"""LoRA in a graph whose numbers are known: any rows, any adapters, the targeted layers and no others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.linears import find_linears, group_linears
from ovms_lora.engine.lora_graph import LoraForm, insert_lora
from ovms_lora.engine.lora_rows import SequenceTiles
from ovms_lora.engine.paged_graph import read_paged_model
from tests.engine.lora_models import LINEARS, Ask, Bases, prompt, serving
from tests.engine.toy_graph import SHAPES, Toy, adapter, assert_close, expected, toy, toy_model

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
ONE = adapter({"m.q": 2, "m.v": 1, "m.o": 3, "head": 2}, seed=1)
TWO = adapter({"m.v": 2, "head": 1}, seed=2, scaling=-0.5)
OTHER = adapter({"m.q": 3, "m.o": 1, "head": 2}, seed=5, scaling=0.5)
TILES = {ONE.digest: np.array([3, 0]), TWO.digest: np.array([1])}


def filled(targets: tuple[str, ...] = tuple(SHAPES), **options: Any) -> Toy:
    made = toy(targets, **options)
    for each in (ONE, TWO):
        made.states.write(TILES[each.digest], each)
    return made


def using(**strengths: float) -> SequenceTiles:
    tiles = [TILES[name.removeprefix("a")] for name in strengths]
    alphas = np.repeat(np.array(list(strengths.values()), np.float32), [len(each) for each in tiles])
    return SequenceTiles(np.concatenate(tiles), alphas)


@pytest.mark.parametrize("zero_row", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_each_row_has_its_own_adapters(dtype: str, bias: bool, zero_row: bool) -> None:
    made = filled(dtype=dtype, bias=bias, zero_row=zero_row)
    found = made.run(X, {0: using(a1=1.0), 2: using(a2=-2.0), 3: using(a1=0.5, a2=1.5)})
    uses = [[(ONE, 1.0)], [], [(TWO, -2.0)], [(ONE, 0.5), (TWO, 1.5)], []]
    assert_close(found, expected(X, uses, bias=bias), dtype)


@pytest.mark.parametrize("zero_row", [False, True])
def test_steps_of_other_sizes_follow_each_other(zero_row: bool) -> None:
    made = filled(zero_row=zero_row)
    for rows in ([], [4], [0, 1, 2, 3, 4], [], [2, 0]):
        found = made.run(X, {row: using(a1=1.0) for row in rows})
        assert_close(found, expected(X, [[(ONE, 1.0)] if row in rows else [] for row in range(5)]))


@pytest.mark.parametrize("count", range(1, 9))
def test_few_or_many_rows_of_one_adapter(count: int) -> None:
    x = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    found = filled(sums=True).run(x, {row: using(a2=1.0) for row in range(count)})
    assert_close(found, expected(x, [[(TWO, 1.0)] if row < count else [] for row in range(9)]))


def test_without_sums_each_row_may_use_one_tile() -> None:
    made = filled(sums=False)
    found = made.run(X, {1: using(a2=2.0), 4: using(a2=-1.0)})
    assert_close(found, expected(X, [[], [(TWO, 2.0)], [], [], [(TWO, -1.0)]]))
    inputs = {name for port in made.model.inputs for name in port.get_names()}
    assert not [name for name in inputs if "sum" in name]


@pytest.mark.parametrize("targets", [("m.q",), ("m.v",), ("m.q", "m.v"), ("m.o",), ("head",), ("m.v", "head")])
def test_only_targeted_layers_change(targets: tuple[str, ...]) -> None:
    made = filled(targets)
    assert made.layout.paths == set(targets)
    assert (made.layout.head_rows is not None) == ("head" in targets)
    assert (made.layout.rows is not None) == (targets != ("head",))
    some = adapter({path: rank for path, rank in {"m.q": 2, "m.v": 1, "m.o": 3, "head": 2}.items() if path in targets})
    made.states.write(TILES["1"], some)
    found = made.run(X, {1: using(a1=1.0), 3: using(a1=0.5)})
    assert_close(found, expected(X, [[], [(some, 1.0)], [], [(some, 0.5)], []]))


def test_without_rows_nothing_changes_whatever_the_states_hold() -> None:
    plain = openvino_core().compile_model(toy_model(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = plain.create_infer_request().infer({"x": X[:, None]})
    for made in (filled(), filled(zero_row=True), toy(tiles=0, zero_row=True)):
        found = made.run(X, {})
        for index in range(2):
            np.testing.assert_array_equal(found[index], result[index][:, 0])


def test_more_tiles_need_no_other_graph() -> None:
    made = filled()
    made.states.resize(7)
    late = adapter({"m.q": 1, "head": 2}, seed=5)
    made.states.write(np.array([6]), late)
    found = made.run(X, {0: SequenceTiles(np.array([6]), np.array([1.5], np.float32)), 2: using(a1=1.0)})
    assert_close(found, expected(X, [[(late, 1.5)], [], [(ONE, 1.0)], [], []]))


def test_a_graph_for_other_devices_holds_standard_operations_only() -> None:
    kinds = {op.get_type_info().version_id for op in toy().model.get_ops()}
    assert all(kind.startswith("opset") for kind in kinds), kinds


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", ["HETERO:CPU", "AUTO:CPU", "MULTI:CPU", "BATCH:CPU"])
def test_it_runs_behind_another_device_name(device: str, dtype: str) -> None:
    made = filled(device=device, dtype=dtype)
    for strength in (1.0, -0.5):
        found = made.run(X, {0: using(a1=strength), 3: using(a2=1.0)})
        assert_close(found, expected(X, [[(ONE, strength)], [], [], [(TWO, 1.0)], []]), dtype)
    made.states.write(TILES["1"], OTHER)
    assert_close(made.run(X, {1: using(a1=1.0)}), expected(X, [[], [(OTHER, 1.0)], [], [], []]), dtype)


@pytest.mark.parametrize("device", ["HETERO:CPU", "AUTO:CPU"])
def test_a_real_graph_takes_adapters_behind_another_device_name(device: str, bases: Bases, tmp_path: Path) -> None:
    llama = bases.get("llama")
    folder = llama.adapter(tmp_path / "x", target_modules=[*LINEARS, "lm_head"])
    asks = [Ask(prompt(30)), Ask(prompt(9))]
    tokens = {}
    for name in ("CPU", device):
        with serving(llama.folder, {"x": folder}, engine={"device": name}) as model:
            uses = model.lora.select("x")
            tokens[name] = model.tokens(*asks, *(replace(each, adapters=uses) for each in asks))
    assert tokens[device] == tokens["CPU"]


def test_what_is_added_to_a_real_graph_is_standard_operations(bases: Bases) -> None:
    folder = bases.get("llama").folder
    before = read_paged_model(openvino_core(), folder)
    after = read_paged_model(openvino_core(), folder)
    groups = group_linears(find_linears(after))
    paths = [linear.path for group in groups for linear in group.linears]
    insert_lora(after, groups, paths, LoraForm(16, "bf16", zero_row=True), head="lm_head")
    kinds = Counter(op.get_type_info().version_id for op in after.get_ops())
    kinds -= Counter(op.get_type_info().version_id for op in before.get_ops())
    assert kinds and all(kind.startswith("opset") for kind in kinds), kinds


def test_huge_values_of_one_adapter_leave_other_rows_alone() -> None:
    made = toy()
    huge = adapter({"m.q": 2, "m.v": 2, "m.o": 2, "head": 2}, seed=3)
    for pair in huge.layers.values():
        pair.a[...] = 9e14
        pair.b[...] = -4e14
    made.states.write(TILES["1"], ONE)
    made.states.write(np.array([2]), huge)
    found = made.run(X, {0: using(a1=1.0), 1: SequenceTiles(np.array([2]), np.ones(1, np.float32)), 2: using(a1=1.0)})
    wanted = expected(X, [[(ONE, 1.0)], [], [(ONE, 1.0)], [], []])
    keep = [0, 2, 3, 4]
    assert_close([each[keep] for each in found], [each[keep] for each in wanted])
