"""Whole exports of the tiny Llama: what they leave, and that it computes what PyTorch and PEFT do."""

import json
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.adapters.adapter import BaseLinears, LinearShape
from ovms_lora.core.config import read_server_config
from ovms_lora.core.graph_pbtxt import parse_graph
from ovms_lora.export.base_linears import read_base_linears
from ovms_lora.export.digests import file_digest
from ovms_lora.export.manifest import read_manifest
from tests.export import oracle
from tests.export.conftest import Fails, Sources, Workshop

FILES = {
    "openvino_model.xml",
    "openvino_model.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "graph.pbtxt",
    "ovms_lora_manifest.json",
}


@pytest.mark.parametrize("name", ["base", "small", "rounded", "merged"])
def test_an_export_leaves_all_that_a_server_needs_and_nothing_else(exported: Workshop, name: str) -> None:
    folder = exported.repository / name
    assert {path.name for path in folder.iterdir()} == FILES
    assert exported.leftovers == []


def test_an_fp32_export_computes_what_pytorch_does(exported: Workshop, sources: Sources) -> None:
    difference = oracle.of_ir(exported.repository / "base") - oracle.of_torch(oracle.plain(sources.base))
    assert np.abs(difference).max() < 1e-4


def test_merging_equals_the_weighted_sum_of_the_adapters(exported: Workshop, sources: Sources) -> None:
    summed = oracle.of_torch(oracle.with_adapters(sources.base, (sources.sql, 0.5), (sources.tools, 1.0)))
    assert np.abs(oracle.of_ir(exported.repository / "merged") - summed).max() < 1e-4
    assert np.abs(oracle.of_torch(oracle.plain(sources.base)) - summed).max() > 0.5


def test_int8_is_a_quarter_in_size_and_close(exported: Workshop, sources: Sources) -> None:
    full, small = (exported.repository / name / "openvino_model.bin" for name in ("base", "small"))
    assert small.stat().st_size < 0.3 * full.stat().st_size
    drift = oracle.of_ir(exported.repository / "small") - oracle.of_torch(oracle.plain(sources.base))
    assert np.abs(drift).mean() < 0.1


def test_bf16_rounds_the_weights_and_nothing_else(exported: Workshop, sources: Sources) -> None:
    import torch

    model = oracle.plain(sources.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert np.abs(oracle.of_ir(exported.repository / "rounded") - oracle.of_torch(model)).max() < 1e-4


@pytest.mark.parametrize("name", ["base", "small", "rounded", "merged"])
def test_the_graph_keeps_the_module_paths_that_adapters_are_matched_by(exported: Workshop, name: str) -> None:
    shapes = read_base_linears(exported.repository / name).shapes
    names = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert set(shapes) == {"lm_head"} | {f"model.layers.{layer}.{linear}" for layer in (0, 1) for linear in names}
    down = shapes["model.layers.1.mlp.down_proj"]
    assert (down.out_features, down.in_features) == (64, 128)


def test_the_manifest_says_what_the_folder_is_made_of(exported: Workshop, sources: Sources) -> None:
    folder = exported.repository / "merged"
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.recipe.source.source == str(sources.base)
    assert [(adapter.source, adapter.weight) for adapter in manifest.recipe.adapters] == [
        (str(sources.sql), 0.5),
        (str(sources.tools), 1.0),
    ]
    assert manifest.recipe.weight_format == "fp32"
    assert {"openvino", "torch", "peft", "nncf", "transformers", "optimum-intel"} <= set(manifest.versions)
    assert set(manifest.files) == FILES - {"ovms_lora_manifest.json"}
    for name, record in manifest.files.items():
        assert record.size == (folder / name).stat().st_size
        assert record.sha256 == file_digest(folder / name)


def test_the_config_file_names_models_adapters_and_composites_for_the_server(exported: Workshop) -> None:
    base, small, _, merged = read_server_config(exported.config).models
    assert (small.name, small.base_path, merged.base_path) == ("small", "models/small", "models/merged")
    assert [(entry.alias, entry.path, entry.alpha) for entry in base.lora_adapters] == [
        ("sql", "models/loras/sql", 1.0),
        ("tools", "models/loras/tools", 0.5),
    ]
    (mix,) = base.composite_lora_adapters
    assert [(part.adapter_alias, part.alpha) for part in mix.components] == [("sql", 0.7), ("tools", None)]
    for entry in base.lora_adapters:
        assert (exported.folder / entry.path / "adapter_model.safetensors").is_file()


def test_the_graph_file_carries_the_serving_flags(
    workshop: Workshop, sources: Sources, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target_device", "GPU.1", "--cache-size", "2", "--max_num_seqs", "8", "--max-num-batched-tokens", "64"]
    flags += ["--enable_prefix_caching", "false", "--disable_dynamic_split_fuse", "--kv_cache_precision", "u8"]
    flags += ["--ov_cache_dir", "cache", "--plugin_config", '{"INFERENCE_PRECISION_HINT": "f32"}']
    flags += ["--tool_parser", "hermes3", "--reasoning-parser", "qwen3"]
    assert workshop.export(sources.base, *flags) == 0
    assert capsys.readouterr().out == f"{workshop.repository / 'tiny'}\n"
    graph = parse_graph((workshop.repository / "tiny" / "graph.pbtxt").read_text())
    options = graph.options
    assert graph.models_path == "./"
    assert (options.device, options.cache_size, options.max_num_seqs, options.max_num_batched_tokens) == (
        *("GPU.1", 2, 8, 64),
    )
    assert not options.enable_prefix_caching
    assert not options.dynamic_split_fuse
    assert options.plugin_config == {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "u8",
        "CACHE_DIR": "cache",
    }
    assert (options.tool_parser, options.reasoning_parser) == ("hermes3", "qwen3")


def test_the_same_request_again_is_nothing_to_do_and_says_so(
    workshop: Workshop, sources: Sources, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.export(sources.base) == 0
    before = (workshop.repository / "tiny" / "ovms_lora_manifest.json").stat()
    workshop.config.unlink()
    capsys.readouterr()
    assert workshop.export(sources.base) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.err
    assert captured.out == f"{workshop.repository / 'tiny'}\n"
    assert (workshop.repository / "tiny" / "ovms_lora_manifest.json").stat() == before
    assert [model.name for model in read_server_config(workshop.config).models] == ["tiny"]


def test_a_source_of_the_same_content_elsewhere_is_the_same_request(
    workshop: Workshop, sources: Sources, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moved").symlink_to(sources.base)
    assert workshop.export(sources.base, "--model_name", "m") == 0
    assert workshop.export(tmp_path / "moved", "--model_name", "m") == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--weight-format", "fp16"], "weight format: int8 → fp16"),
        (["--adapter", "SQL=0.5"], "adapters: none → SQL=0.5"),
        (["--cache_size", "4"], "cache_size: 0 → 4"),
        (["--plugin_config", '{"A": "b"}'], 'plugin_config: {} → {"A": "b"}'),
    ],
)
def test_a_different_request_is_an_error_that_says_what_differs(
    workshop: Workshop, sources: Sources, quick: None, fails: Fails, flags: list[str], difference: str
) -> None:
    workshop.export(sources.base)
    manifest = (workshop.repository / "tiny" / "ovms_lora_manifest.json").read_bytes()
    fails_with, hint = fails(sources.base, *(flag.replace("SQL", str(sources.sql)) for flag in flags))
    assert difference.replace("SQL", str(sources.sql)) in fails_with
    assert "--overwrite_models" in hint
    assert (workshop.repository / "tiny" / "ovms_lora_manifest.json").read_bytes() == manifest


def test_overwrite_replaces_the_folder_and_keeps_the_entry(workshop: Workshop, sources: Sources, quick: None) -> None:
    assert workshop.export(sources.base) == 0
    stale = workshop.repository / "tiny" / "stale.txt"
    stale.touch()
    assert workshop.export(sources.base, "--weight_format", "fp16", "--overwrite-models") == 0
    assert not stale.exists()
    manifest = read_manifest(workshop.repository / "tiny")
    assert manifest is not None and manifest.recipe.weight_format == "fp16"
    assert workshop.leftovers == []
    assert len(read_server_config(workshop.config).models) == 1


def test_a_damaged_folder_is_not_taken_for_the_same_export(
    workshop: Workshop, sources: Sources, quick: None, fails: Fails
) -> None:
    workshop.export(sources.base)
    (workshop.repository / "tiny" / "openvino_model.bin").write_bytes(b"")
    cause, hint = fails(sources.base)
    assert "damaged: openvino_model.bin has 0 bytes" in cause
    assert "--overwrite_models" in hint


def test_a_folder_of_someone_else_is_left_alone_even_with_overwrite(
    workshop: Workshop, sources: Sources, quick: None, fails: Fails
) -> None:
    mine = workshop.repository / "tiny" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    for flags in ([], ["--overwrite_models"]):
        cause, _ = fails(sources.base, *flags)
        assert "was not written by this exporter" in cause
    assert mine.read_text() == "years of work"


def test_a_model_inside_another_and_one_around_another_are_refused(
    workshop: Workshop, sources: Sources, quick: None, fails: Fails
) -> None:
    assert workshop.export(sources.base, "--model_name", "org/one") == 0
    assert "inside the model" in fails(sources.base, "--model_name", "org/one/two")[0]
    (workshop.repository / "org" / "graph.pbtxt").touch()
    assert "would be lost" in fails(sources.base, "--model_name", "org", "--overwrite_models")[0]


def test_too_small_a_disk_is_seen_before_the_long_work(
    workshop: Workshop, sources: Sources, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    cause, hint = fails(sources.base)
    assert "are free" in cause
    assert "--model_repository_path" in hint


def test_an_adapter_of_links_as_in_the_hubs_cache_is_copied_as_files(
    workshop: Workshop, exported: Workshop, sources: Sources, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (linked / name).symlink_to(sources.sql / name)
    (tmp_path / "template").write_text("own")
    (linked / "chat_template.jinja").symlink_to(tmp_path / "template")
    repository = ["--model_repository_path", str(exported.repository), "--model_name", "base"]
    flags = [*repository, "--weight-format", "fp32", "--source_loras", f"linked={linked}"]
    assert workshop.export(sources.base, *flags) == 0
    copies = list((exported.repository / "loras" / "linked").iterdir())
    assert {path.name for path in copies} == {path.name for path in linked.iterdir()}
    assert not any(path.is_symlink() for path in copies)
    (tmp_path / "template").write_text("another")
    assert workshop.export(sources.base, *flags) == 1


def test_an_adapter_of_another_base_is_refused_before_the_base_is_published(
    workshop: Workshop, sources: Sources, quick: None, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = BaseLinears({"model.layers.0.self_attn.q_proj": LinearShape(out_features=32, in_features=32)})
    monkeypatch.setattr("ovms_lora.export.loras.read_base_linears", lambda folder: other)
    cause, _ = fails(sources.base, "--source_loras", f"sql={sources.sql}")
    assert cause.startswith("adapter 'sql': ")
    assert workshop.models == []
    assert not workshop.config.exists()


def test_adapters_in_place_already_are_left_and_others_need_overwrite(
    workshop: Workshop, exported: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = ["--model_repository_path", str(exported.repository), "--model_name", "base"]
    same = [*repository, "--weight-format", "fp32", "--source_loras", f"sql={sources.sql}"]
    stamp = (exported.repository / "loras" / "sql").stat().st_mtime_ns
    assert workshop.export(sources.base, *same) == 0
    assert (exported.repository / "loras" / "sql").stat().st_mtime_ns == stamp
    other = [*same[:-1], f"sql={sources.tools}"]
    capsys.readouterr()
    assert workshop.export(sources.base, *other) == 1
    assert "loras/sql holds another adapter" in capsys.readouterr().err
    entry = json.loads(workshop.config.read_text())["model_config_list"][0]["config"]
    assert [adapter["alias"] for adapter in entry["lora_adapters"]] == ["sql"]
