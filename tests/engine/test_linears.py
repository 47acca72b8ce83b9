"""The linear layers of a graph are PyTorch's, and joining them changes no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import openvino as ov
import pytest

from ovms_lora.adapters.adapter import LinearShape
from ovms_lora.core.config import EngineOptions
from ovms_lora.engine import graph_source
from ovms_lora.engine import linears as linears_module
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.linears import Carrier, Linear, LinearGroup, find_linears, group_linears, split_carrier
from ovms_lora.engine.paged_graph import read_paged_model
from tests.engine.harness import Answer
from tests.engine.lora_models import FAMILIES, LINEARS, Ask, Base, Bases, prompt, serving
from tests.engine.toy_graph import WEIGHTS, toy_model

ASK = Ask(prompt(30), max_tokens=8, logprobs=20, prompt_logprobs=20)


@pytest.fixture(scope="module")
def int8(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with weights in 8 bits."""
    import shutil
    import warnings

    folder, work = tmp_path_factory.mktemp("int8") / "llama", tmp_path_factory.mktemp("work")
    shutil.copytree(bases.get("llama").folder, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ovms_lora.export.compress import compress
        from ovms_lora.export.compression import Compression
        from ovms_lora.export.weight_format import WeightFormat

        compress(folder, work, WeightFormat.INT8, Compression())
    return folder


def apart(found: Sequence[Linear]) -> list[LinearGroup]:
    """Each linear by itself, as the model was exported."""
    return [
        LinearGroup((each,), (Carrier((each,), each.node.output(0), tuple(each.node.output(0).get_target_inputs())),))
        for each in found
    ]


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_the_linears_are_those_of_pytorch(name: str, bases: Bases) -> None:
    import torch

    base = bases.get(name)
    expected = {
        path: LinearShape(module.out_features, module.in_features)
        for path, module in base.torch.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    found = GraphSource(base.folder, EngineOptions()).linears
    assert found.shapes == expected
    assert found.output_head == "lm_head"


def test_the_linears_of_compressed_weights_are_the_same(int8: Path, bases: Bases) -> None:
    base = bases.get("llama")
    options = EngineOptions()
    assert GraphSource(int8, options).linears == GraphSource(base.folder, options).linears


def carriers(folder: Path) -> list[list[str]]:
    """The last names of linears that are one after joining, in the first decoder block."""
    groups = group_linears(find_linears(read_paged_model(openvino_core(), folder)))
    joined = [[linear.path for linear in carrier.linears] for group in groups for carrier in group.carriers]
    return [[path.rpartition(".")[2] for path in paths] for paths in joined if "layers.0." in paths[0]]


@pytest.mark.parametrize("name", ["llama", "qwen2", "int8"])
def test_layers_that_read_one_input_become_one(name: str, bases: Bases, int8: Path) -> None:
    folder = int8 if name == "int8" else bases.get(name).folder
    assert sorted(map(sorted, carriers(folder))) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]


def answers(folder: Path, adapter: Path) -> list[Answer]:
    with serving(folder, {"x": adapter}) as model:
        (plain,) = model.together(ASK)
        (adapted,) = model.together(replace(ASK, adapters=model.lora.select("x")))
    return [plain, adapted]


@pytest.mark.parametrize("targets", [list(LINEARS), ["q_proj", "v_proj", "up_proj"], ["k_proj"]])
@pytest.mark.parametrize("name", ["llama", "qwen2", "int8"])
def test_joining_changes_no_numbers(name: str, targets: list[str], bases: Bases, int8: Path, tmp_path: Path) -> None:
    base: Base = bases.get("llama" if name == "int8" else name)
    folder = int8 if name == "int8" else base.folder
    adapter = base.adapter(tmp_path / "x", target_modules=targets)
    joined = answers(folder, adapter)
    with mock.patch.object(graph_source, "group_linears", apart):
        unjoined = answers(folder, adapter)
    for one, other in zip(joined, unjoined, strict=True):
        assert one.token_ids == other.token_ids
        for mine, theirs in zip(values(one), values(other), strict=True):
            assert mine == pytest.approx(theirs, abs=2e-3)


def values(answer: Answer) -> list[float]:
    return [entry.logprob for entry in (*answer.prompt_logprobs[0][1:], *answer.logprobs) if entry]


def test_weights_of_different_kinds_stay_apart() -> None:
    model = toy_model()
    found = find_linears(model)
    q = next(linear for linear in found if linear.path == "m.q")
    half = ov.opset13.convert(ov.opset13.constant(WEIGHTS["m.q"].astype(np.float16)), "f32")
    q.node.input(1).replace_source_output(half.output(0))
    groups = {group.linears[0].path: group for group in group_linears(found)}
    assert [len(carrier.linears) for group in groups.values() for carrier in group.carriers] == [1, 1, 1, 1]


def test_a_carrier_is_split_for_layers_that_are_treated_apart() -> None:
    groups = group_linears(find_linears(toy_model()))
    (carrier,) = next(group for group in groups if len(group.linears) == 2).carriers
    parts = split_carrier(carrier)
    assert [part.linears[0].path for part in parts] == [linear.path for linear in carrier.linears]
    assert [part.output.get_partial_shape()[2].get_length() for part in parts] == [
        linear.out_features for linear in carrier.linears
    ]
    assert split_carrier(parts[0]) == (parts[0],)


def test_what_is_no_linear_of_a_module_is_not_found() -> None:
    model = toy_model()
    for node in model.get_ordered_ops():
        if node.get_friendly_name().startswith("__module.m."):
            node.set_friendly_name(node.get_friendly_name().removeprefix("__module."))
    assert [linear.path for linear in find_linears(model)] == ["head"]
    assert linears_module.group_linears([]) == []
