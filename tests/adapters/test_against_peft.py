"""Every number and every selection is PEFT's: the same folder, read by PEFT and by us, gives the same weight deltas."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ovms_lora.adapters.adapter import Adapter, BaseLinears, LinearShape, inspect_adapter, load_adapter
from tests.adapters.adapter_files import Array, safetensors_bytes, tolerance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn of at import is theirs
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    yield LlamaForCausalLM(config)
    torch.set_num_threads(threads)


def base_of(model: Any) -> BaseLinears:
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = LinearShape(module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            shapes[name] = LinearShape(module.weight.shape[1], module.weight.shape[0])
    return BaseLinears(shapes=shapes)


def save(model: Any, folder: Path, dtype: Any = None, **settings: Any) -> Path:
    """Let PEFT make an adapter with random A and B, and save it."""
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    made = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    if dtype is not None:
        made = made.to(dtype)
    made.save_pretrained(folder)
    return folder


def peft_deltas(model: Any, folder: Path) -> dict[str, Array]:
    """The deltas of the adapter as PEFT reads it from the folder, [out, in] per module."""
    read = PeftModel.from_pretrained(copy.deepcopy(model), str(folder), autocast_adapter_dtype=False)
    deltas = {}
    for name, module in read.base_model.model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight("default").detach().float().numpy()
            deltas[name] = delta.T if module.fan_in_fan_out else delta
    return deltas


def our_deltas(adapter: Adapter) -> dict[str, Array]:
    return {name: pair.scaling * (pair.b.astype(F32) @ pair.a.astype(F32)) for name, pair in adapter.layers.items()}


def load(model: Any, folder: Path, lora_dtype: Any = F32) -> Adapter:
    return load_adapter(folder, base_of(model), max_lora_rank=256, lora_dtype=lora_dtype)


def assert_same(ours: dict[str, Array], theirs: dict[str, Array], relative: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, delta in theirs.items():
        np.testing.assert_allclose(ours[name], delta, rtol=0, atol=relative * np.abs(delta).max(), err_msg=name)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16},
    "rslora": {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 16, "use_rslora": True},
    "alpha of one third": {"target_modules": ["o_proj"], "r": 3, "lora_alpha": 1},
    "rank 1": {"target_modules": ["down_proj"], "r": 1, "lora_alpha": 2},
    "rank 256": {"target_modules": ["up_proj"], "r": 256, "lora_alpha": 16},
    "one full path": {"target_modules": ["model.layers.1.mlp.gate_proj"], "r": 4},
    "lm_head": {"target_modules": ["q_proj", "lm_head"], "r": 4},
    "all-linear": {"target_modules": "all-linear", "r": 4},
    "expression for targets": {"target_modules": r".*\.(0|2)\.(self_attn\.[qk]_proj|mlp\.up_proj)", "r": 4},
    "expression with lookahead": {"target_modules": r"^(model\.layers(?=\.).*\.(q_proj|gate_proj))$", "r": 4},
    "negative lookahead": {"target_modules": r"^(?!.*\.1\.).*\.v_proj$", "r": 4},
    "excluded names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"], "r": 4},
    "excluded expression": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.[02]\..*v_proj", "r": 4},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"q_proj": 6}},
    "rank_pattern, path": {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 16, "layers.2.self_attn.v_proj": 2},
    },
    "patterns as expressions": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"^model\.layers\.[01]\.self_attn\.(q|v)_proj": 12, "up_pro.": 3},
        "alpha_pattern": {r".*\.2\..*": 32, r"layers\.\d+\.mlp\.\w+": 5},
    },
    "the first pattern wins": {
        "target_modules": ["q_proj"],
        "r": 4,
        "rank_pattern": {"1.self_attn.q_proj": 5, r"\d.self_attn.q_proj": 6, "q_proj": 7},
        "alpha_pattern": {"0.self_attn.q_proj": 3.5, "q_proj": 9},
    },
    "alpha_pattern with rslora": {
        "target_modules": ["k_proj", "o_proj"],
        "r": 9,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {"o_proj": 24},
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "r": 4},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2], "r": 4},
    "layers of a pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
        "r": 4,
    },
    "layers of patterns": {
        "target_modules": ["v_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["blocks", "model.layers"],
        "r": 4,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_deltas_are_those_of_peft(feature: str, llama: Any, tmp_path: Path) -> None:
    folder = save(llama, tmp_path, **FEATURES[feature])
    assert_same(our_deltas(load(llama, folder)), peft_deltas(llama, folder))


@pytest.mark.parametrize(("dtype", "theirs"), [("float32", F32), ("float16", np.float16), ("bfloat16", None)])
def test_each_dtype_is_read_as_peft_reads_it(dtype: str, theirs: Any, llama: Any, tmp_path: Path) -> None:
    kind = theirs or ml_dtypes.bfloat16
    folder = save(llama, tmp_path, dtype=getattr(torch, dtype), target_modules=["q_proj", "down_proj"], r=8)
    adapter = load(llama, folder)
    assert inspect_adapter(folder).dtypes == (dtype,)
    # PEFT rounds the delta of a half-precision adapter back to its dtype.
    assert_same(our_deltas(adapter), peft_deltas(llama, folder), max(1e-5, tolerance(kind, 1)))


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_conversion_costs_no_more_than_rounding(kind: Any, llama: Any, tmp_path: Path) -> None:
    folder = save(llama, tmp_path, target_modules="all-linear", r=8)
    adapter = load(llama, folder, kind)
    assert {pair.a.dtype for pair in adapter.layers.values()} == {np.dtype(kind)}
    assert_same(our_deltas(adapter), peft_deltas(llama, folder), tolerance(kind, 8))


def test_fan_in_fan_out_is_that_of_a_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
    folder = save(gpt2, tmp_path, target_modules=["c_attn", "c_proj"], r=4, fan_in_fan_out=True)
    adapter = load(gpt2, folder)
    assert adapter.config.fan_in_fan_out
    assert_same(our_deltas(adapter), peft_deltas(gpt2, folder))


def test_fan_in_fan_out_changes_nothing_for_a_linear(llama: Any, tmp_path: Path) -> None:
    folder = save(llama, tmp_path, target_modules=["v_proj"], r=4, fan_in_fan_out=True)
    assert_same(our_deltas(load(llama, folder)), peft_deltas(llama, folder))


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_of_lm_head_that_peft_saves_is_left_alone(tied: bool, llama: Any, tmp_path: Path) -> None:
    config = copy.deepcopy(llama.config)
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config)
    folder = save(model, tmp_path, target_modules=["lm_head"], r=4)
    adapter = load(model, folder)
    assert adapter.frozen_copies == ("base_model.model.lm_head.base_layer.weight",)
    assert_same(our_deltas(adapter), peft_deltas(model, folder))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model.").replace(".weight", ".my-adapter.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model.model."),
    ],
    ids=["no prefix", "adapter name", "neither", "model. twice"],
)
def test_names_may_have_other_forms(rename: Any, llama: Any, tmp_path: Path) -> None:
    folder = save(llama, tmp_path, target_modules=["q_proj", "o_proj"], r=4)
    before = peft_deltas(llama, folder)
    weights = folder / "adapter_model.safetensors"
    adapter = load(llama, folder)
    tensors = {}
    for name, pair in adapter.layers.items():
        tensors[rename(f"base_model.model.{name}.lora_A.weight")] = pair.a
        tensors[rename(f"base_model.model.{name}.lora_B.weight")] = pair.b
    weights.write_bytes(safetensors_bytes(tensors))
    assert_same(our_deltas(load(llama, folder)), before)


def test_the_saved_configuration_of_peft_needs_no_change(llama: Any, tmp_path: Path) -> None:
    folder = save(llama, tmp_path, target_modules=["q_proj"], r=4)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert {"use_dora", "megatron_core", "qalora_group_size"} <= saved.keys()
    assert load(llama, folder).config.r == 4
