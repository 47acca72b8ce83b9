"""Merging gives what PEFT computes with the adapters unmerged, in every kind that PEFT can merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovms_lora.core.errors import ExportError
from ovms_lora.export.merge import choose_dtype, fit_vocabulary, load_model, load_tokenizer, merge_adapter
from ovms_lora.export.peft_folder import find_adapter
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.source import tensor_shapes, weight_files
from ovms_lora.export.weight_format import WeightFormat
from tests.export import oracle
from tests.export.conftest import Sources
from tests.tiny_llama import build_tiny_llama

# Said when an adapter of the head is saved; that the file then holds the head's own weight too is part of the test.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")

MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Save a PEFT adapter with random weights for a base: any PEFT configuration."""

    def make(base: Path, config: Any, *, name: str = "adapter") -> Path:
        import torch
        from peft import get_peft_model

        adapted = get_peft_model(oracle.plain(base), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return make


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    )


def ia3(**options: Any) -> Any:
    from peft import IA3Config

    return IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def loha(**options: Any) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(r=4, alpha=8, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")


def lokr(**options: Any) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(r=4, alpha=8, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")


def merged(base: Path, *adapters: tuple[Path, float]) -> Any:
    import torch

    with ExportProgress().silence():
        model = load_model(base, dtype=torch.float32)
        for folder, weight in adapters:
            model = merge_adapter(model, find_adapter(str(folder), weight))
    return model


def drift(base: Path, *adapters: tuple[Path, float]) -> float:
    """Largest difference of a log-probability between merged and unmerged."""
    expected = oracle.of_torch(oracle.with_adapters(base, *adapters))
    assert np.abs(expected - oracle.of_torch(oracle.plain(base))).max() > 0.01
    return float(np.abs(oracle.of_torch(merged(base, *adapters)) - expected).max())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 1}},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head", "q_proj"]},
        {"bias": "none", "use_dora": True},
        {"modules_to_save": ["norm"]},
        ia3,
        loha,
        lokr,
    ],
    ids=str,
)
def test_merged_equals_unmerged(sources: Sources, make_adapter: MakeAdapter, config: Any) -> None:
    made = config() if callable(config) else lora(**config)
    assert drift(sources.base, (make_adapter(sources.base, made), 1.0)) < 1e-4


def test_several_adapters_with_weights_are_their_weighted_sum(sources: Sources, make_adapter: MakeAdapter) -> None:
    rooted = make_adapter(sources.base, lora(use_rslora=True, r=2, target_modules=["v_proj", "q_proj"]))
    adapters = ((sources.sql, 0.3), (rooted, -1.5), (sources.tools, 2.0), (sources.sql, 0.0))
    assert drift(sources.base, *adapters) < 1e-4


def test_a_tied_head_is_changed_without_the_embeddings(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    build_tiny_llama(tmp_path / "tied", tied=True)
    with ExportProgress().silence():
        adapter = make_adapter(tmp_path / "tied", lora(target_modules=["lm_head", "v_proj"]))
        assert drift(tmp_path / "tied", (adapter, 1.0)) < 1e-4


def test_a_tokenizer_with_more_tokens_gets_its_rows(sources: Sources, tmp_path: Path) -> None:
    import torch

    tokenizer = load_tokenizer(sources.base)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    model = load_model(sources.base, dtype=torch.float32)
    before = model.get_input_embeddings().weight.shape[0]
    fit_vocabulary(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == before + 2
    assert model.get_output_embeddings().weight.shape[0] == before + 2


def test_an_adapter_with_tokens_of_its_own_brings_their_rows(sources: Sources, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    def resized() -> Any:
        model = oracle.plain(sources.base)
        model.resize_token_embeddings(302, mean_resizing=False)
        return model

    adapted = get_peft_model(resized(), lora(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=True)
    tokenizer = load_tokenizer(sources.base)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    with ExportProgress().silence():
        model = oracle.plain(sources.base)
        fit_vocabulary(model, tokenizer)
        merged = merge_adapter(model, find_adapter(str(tmp_path)))
        expected = oracle.of_torch(PeftModel.from_pretrained(resized(), str(tmp_path)))
    assert np.abs(oracle.of_torch(merged) - expected).max() < 1e-4


def test_a_tensor_that_no_layer_takes_is_refused_by_name(sources: Sources, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(sources.base, lora())
    rewrite(adapter, lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()})
    with pytest.raises(ExportError, match=r"layers\.7\..* matches no layer"):
        merged(sources.base, (adapter, 1.0))


def test_a_missing_tensor_is_refused_by_name(sources: Sources, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(sources.base, lora())
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(adapter, lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    with pytest.raises(ExportError, match=f"is incomplete: {lost} is missing"):
        merged(sources.base, (adapter, 1.0))


def test_a_weight_that_is_not_a_number_is_refused(sources: Sources, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(sources.base, lora())
    rewrite(adapter, lambda tensors: {name: np.full_like(t, np.nan) for name, t in tensors.items()})
    with pytest.raises(ExportError, match="cannot be merged"):
        merged(sources.base, (adapter, 1.0))


def test_a_model_that_lacks_a_weight_is_refused(sources: Sources, tmp_path: Path) -> None:
    import shutil

    import torch

    shutil.copytree(sources.base, tmp_path / "base")
    rewrite(tmp_path / "base", lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    with pytest.raises(ExportError, match=r"model\.norm\.weight"), ExportProgress().silence():
        load_model(tmp_path / "base", dtype=torch.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_with_a_weight_that_is_not_finite_is_refused_by_name(
    sources: Sources, tmp_path: Path, value: float
) -> None:
    import shutil

    import torch

    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["model.norm.weight"][3] = value
        return tensors

    shutil.copytree(sources.base, tmp_path / "base")
    rewrite(tmp_path / "base", spoil)
    with pytest.raises(ExportError, match=r"model\.norm\.weight has values"), ExportProgress().silence():
        load_model(tmp_path / "base", dtype=torch.float32)


def test_a_sharded_model_is_loaded_whole(sources: Sources, tmp_path: Path) -> None:
    import torch

    with ExportProgress().silence():
        model = oracle.plain(sources.base)
        model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
        shards = weight_files(tmp_path / "shards")
        assert len(shards) > 2
        assert tensor_shapes(shards).keys() == tensor_shapes(weight_files(sources.base)).keys()
        loaded = load_model(tmp_path / "shards", dtype=torch.float32)
    assert np.array_equal(oracle.of_torch(loaded), oracle.of_torch(model))


def test_code_of_the_source_runs_only_if_trusted(sources: Sources, tmp_path: Path) -> None:
    import shutil

    import torch

    shutil.copytree(sources.base, tmp_path / "base")
    (tmp_path / "base" / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="runs Python code of its own") as error:
        load_model(tmp_path / "base", dtype=torch.float32)
    assert "--trust-remote-code" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("own", "weight_format", "merging", "loaded"),
    [
        ("bfloat16", "int8", False, "bfloat16"),
        ("bfloat16", "int8", True, "float32"),
        ("bfloat16", "fp32", False, "float32"),
        ("bfloat16", "fp16", False, "float32"),
        ("float16", "fp16", False, "float16"),
        ("float32", "int8", False, "float32"),
        (None, "int8", False, "float32"),
    ],
)
def test_weights_are_loaded_in_their_own_precision_where_that_loses_nothing(
    tmp_path: Path, own: str | None, weight_format: str, merging: bool, loaded: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": own}))
    assert str(choose_dtype(tmp_path, WeightFormat(weight_format), merging=merging)) == f"torch.{loaded}"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of the folder's one safetensors file."""
    from safetensors.numpy import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
