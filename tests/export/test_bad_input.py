"""What a user can get wrong: a one-line cause, a hint, exit code 1 or 2, nothing left, and all before the long work."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.export import resources, text_generation
from tests.export.conftest import Fails, Sources, Workshop
from tests.tiny_llama import build_tiny_adapter, build_tiny_llama


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr(text_generation, "_convert", begun)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def copy(folder: Path, to: Path, **changes: Any) -> Path:
    """Copy a model or adapter folder with changes to its configuration."""
    shutil.copytree(folder, to)
    name = "adapter_config.json" if (to / "adapter_config.json").exists() else "config.json"
    document = json.loads((to / name).read_text()) | changes
    (to / name).write_text(json.dumps(document))
    return to


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "a/b/c", "..//x", "$(touch x)"])
def test_a_source_that_is_not_there(fails: Fails, source: str) -> None:
    cause, hint = fails(source)
    assert "no such model" in cause
    assert "path" in hint


def test_a_hub_that_cannot_be_reached(fails: Fails, offline: None) -> None:
    cause, hint = fails("org/nothing")
    assert "no folder org/nothing, and no such model from the hub" in cause
    assert "network" in hint


def test_files_that_are_not_gguf(fails: Fails, tmp_path: Path) -> None:
    text, gguf = tmp_path / "model.txt", tmp_path / "model.gguf"
    text.write_text("text")
    gguf.write_text("not a model")
    assert "not a .gguf" in fails(text)[0]
    assert "is not a GGUF file" in fails(gguf)[0]


def test_folders_that_are_not_models(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fails(tmp_path / "empty")[0]
    assert "is an adapter, not a model" in fails(sources.sql)[0]
    broken = copy(sources.base, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert "config.json is not valid JSON" in fails(broken)[0]


def test_models_whose_weights_are_pickled_missing_or_cut(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    pickled = copy(sources.base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "its weights are pickled" in fails(pickled)[0]
    sharded = copy(sources.base, tmp_path / "sharded")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002.safetensors is missing" in fails(sharded)[0]
    cut = copy(sources.base, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 5000)
    assert "not a whole safetensors file" in fails(cut)[0]


@pytest.mark.parametrize("flag", ["--adapter", "--source_loras"])
def test_a_folder_that_is_not_an_adapter(fails: Fails, sources: Sources, tmp_path: Path, flag: str) -> None:
    (tmp_path / "empty").mkdir()
    value = f"{tmp_path / 'empty'}" if flag == "--adapter" else f"x={tmp_path / 'empty'}"
    cause, _ = fails(sources.base, flag, value)
    assert "adapter_config.json" in cause


@pytest.mark.parametrize("flag", ["--adapter", "--source_loras"])
def test_an_adapter_in_a_pickle_is_never_read(fails: Fails, sources: Sources, tmp_path: Path, flag: str) -> None:
    adapter = copy(sources.sql, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({}))
    cause, hint = fails(sources.base, flag, str(adapter) if flag == "--adapter" else f"x={adapter}")
    assert "adapter_model.bin" in cause
    assert "pickle" in cause
    assert "save" in hint


def test_an_adapter_of_a_base_of_another_shape(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    build_tiny_llama(tmp_path / "wide", hidden=96)
    build_tiny_adapter(tmp_path / "adapter", tmp_path / "wide")
    cause, hint = fails(sources.base, "--adapter", str(tmp_path / "adapter"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is 4 x 96" in cause
    assert "the layer's weight 64 x 64" in cause
    assert "tiny-llama" in hint


def test_adapters_that_cannot_be_merged(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    other = copy(sources.sql, tmp_path / "other", task_type="SEQ_CLS")
    assert "is for SEQ_CLS" in fails(sources.base, "--adapter", str(other))[0]
    dora = copy(sources.sql, tmp_path / "dora", use_dora=True)
    assert "is DoRA, which cannot be merged at weight 0.5" in fails(sources.base, "--adapter", f"{dora}=0.5")[0]
    importing = copy(sources.sql, tmp_path / "importing", megatron_config={"a": 1}, megatron_core="evil")
    assert "megatron_config" in fails(sources.base, "--adapter", str(importing))[0]
    cut = copy(sources.sql, tmp_path / "cut")
    os.truncate(cut / "adapter_model.safetensors", 1000)
    assert "not a whole safetensors file" in fails(sources.base, "--adapter", str(cut))[0]


def test_runtime_adapters_are_checked_by_the_servers_rules(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    dora = copy(sources.sql, tmp_path / "dora", use_dora=True)
    cause, _ = fails(sources.base, "--source_loras", f"good={sources.sql},bad={dora}")
    assert "adapter 'bad'" in cause
    assert "use_dora" in cause


def test_a_tokenizer_needs_one_adapter_and_must_be_one(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    tokenizer = ["--tokenizer", str(sources.base)]
    assert "exactly one --adapter" in fails(sources.base, *tokenizer, code=2)[0]
    two = ["--adapter", str(sources.sql), "--adapter", str(sources.tools)]
    assert "exactly one --adapter" in fails(sources.base, *tokenizer, *two, code=2)[0]
    (tmp_path / "none").mkdir()
    flags = ["--adapter", str(sources.sql), "--tokenizer", str(tmp_path / "none")]
    assert "holds no tokenizer" in fails(sources.base, *flags)[0]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", ".hidden", "a b", "$(touch x)", "`x`", "a;b", "x" * 200, "é"])
def test_names_that_look_like_paths_or_shell(fails: Fails, sources: Sources, tmp_path: Path, name: str) -> None:
    cause, hint = fails(sources.base, "--model_name", name, code=2)
    assert "is not valid" in cause
    assert "--model_name" in hint
    assert list(tmp_path.iterdir()) == []


def test_a_source_name_that_is_no_model_name(fails: Fails, sources: Sources, tmp_path: Path) -> None:
    odd = copy(sources.base, tmp_path / "my model; rm -rf x")
    assert "is not valid" in fails(odd, code=2)[0]


def test_the_folder_of_runtime_adapters_is_no_model(fails: Fails, sources: Sources) -> None:
    assert "loras/" in fails(sources.base, "--model_name", "loras", code=2)[0]


def test_a_broken_config_file(fails: Fails, workshop: Workshop, sources: Sources) -> None:
    workshop.config.write_text('{"model_config_list": [')
    cause, hint = fails(sources.base)
    assert "config.json is not valid JSON" in cause
    assert "--config_file_path" in hint
    assert workshop.config.read_text() == '{"model_config_list": ['


def test_an_alias_that_another_model_has(fails: Fails, workshop: Workshop, sources: Sources) -> None:
    other = {"name": "sql", "base_path": "x"}
    workshop.config.write_text(json.dumps({"model_config_list": [{"config": other}]}))
    assert "'sql' is used twice" in fails(sources.base, "--source_loras", f"sql={sources.sql}")[0]


def test_a_repository_that_is_a_file(sources: Sources, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.repository.touch()
    assert workshop.export(sources.base) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_refusing_file_system(fails: Fails, sources: Sources, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(plan: object, source: Path, folder: Path, progress: object) -> None:
        raise OSError(code, os.strerror(code), str(folder / "openvino_model.bin"))

    monkeypatch.setattr(text_generation, "_convert", refuse)
    cause, _ = fails(sources.base)
    assert os.strerror(code) in cause
    assert "openvino_model.bin" in cause


def test_too_little_memory_is_seen_before_the_long_work(
    fails: Fails, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 10**8)
    cause, hint = fails(sources.base)
    assert "of memory, 100.0 MB are available" in cause or "of memory, 0.1 GB are available" in cause
    assert "machine" in hint


def test_memory_that_is_refused(fails: Fails, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(text_generation, "_convert", refuse)
    assert "not enough memory" in fails(sources.base)[0]
