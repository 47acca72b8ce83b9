"""An OpenVINO model as the source: registered as it is, and told from what cannot be done to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ovms_lora.core.config import read_server_config
from ovms_lora.core.graph_pbtxt import parse_graph
from ovms_lora.export.manifest import read_manifest
from ovms_lora.export.openvino_folder import stored_format
from tests.export.conftest import Fails, Sources, Workshop


@pytest.fixture
def ready(exported: Workshop, tmp_path: Path) -> Path:
    """An int8 model as someone else would hand it on: without manifest and graph.pbtxt."""
    folder = tmp_path / "ready"
    shutil.copytree(exported.repository / "small", folder)
    for name in ("ovms_lora_manifest.json", "graph.pbtxt"):
        (folder / name).unlink()
    return folder


def test_it_is_copied_described_and_named_in_the_config_file(workshop: Workshop, ready: Path) -> None:
    assert workshop.export(ready, "--model_name", "m", "--target_device", "GPU") == 0
    folder = workshop.repository / "m"
    for path in ready.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.recipe.weight_format == "int8" and manifest.damage(folder) is None
    assert parse_graph((folder / "graph.pbtxt").read_text()).options.device == "GPU"
    assert [model.base_path for model in read_server_config(workshop.config).models] == ["models/m"]
    (ready / "openvino_model.bin").write_bytes(b"")  # the copy does not depend on it
    assert manifest.damage(folder) is None


def test_it_takes_its_own_name_and_is_nothing_to_do_the_second_time(
    workshop: Workshop, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.export(ready) == workshop.export(ready, "--weight-format", "int8") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert workshop.models == ["ready"]


def test_the_defaults_of_a_device_are_not_asked_of_it(workshop: Workshop, ready: Path) -> None:
    assert workshop.export(ready, "--target_device", "NPU") == 0
    manifest = read_manifest(workshop.repository / "ready")
    assert manifest is not None and (manifest.recipe.weight_format, manifest.recipe.compression) == ("int8", {})


def test_an_exported_folder_can_be_registered_elsewhere(workshop: Workshop, exported: Workshop) -> None:
    assert workshop.export(exported.repository / "small", "--model_name", "copy") == 0
    manifest = read_manifest(workshop.repository / "copy")
    assert manifest is not None and manifest.name == "copy"


def test_runtime_adapters_go_with_it(workshop: Workshop, ready: Path, sources: Sources) -> None:
    assert workshop.export(ready, "--source_loras", f"sql={sources.sql}") == 0
    (model,) = read_server_config(workshop.config).models
    assert [adapter.alias for adapter in model.lora_adapters] == ["sql"]


@pytest.mark.parametrize(
    ("flags", "cause", "hint"),
    [
        (["--adapter", "SQL"], "--adapter cannot be merged into weights that are converted already", "--source_loras"),
        (["--weight-format", "int4"], "its weights are int8, not int4", "leave --weight-format out"),
        (["--verify"], "--verify needs the PyTorch model", "leave --verify out"),
        (["--extra_quantization_params", "--sym"], "--extra_quantization_params needs the PyTorch model", "leave"),
    ],
)
def test_what_cannot_be_done_to_it_is_an_error_that_says_why(
    fails: Fails, ready: Path, sources: Sources, flags: list[str], cause: str, hint: str
) -> None:
    words = [str(sources.sql) if flag == "SQL" else flag for flag in flags]
    message, advice = fails(ready, *words, code=2)
    assert "is an OpenVINO model, which is registered as it is" in message
    assert cause in message
    assert hint in advice


@pytest.mark.parametrize("name", ["openvino_model.bin", "config.json", "tokenizer.json"])
def test_one_that_lacks_a_file_is_refused_by_its_name(fails: Fails, ready: Path, name: str) -> None:
    (ready / name).unlink()
    assert f"without {name}" in fails(ready)[0]


def test_one_that_is_cut_is_refused(fails: Fails, ready: Path) -> None:
    xml = ready / "openvino_model.xml"
    xml.write_bytes(xml.read_bytes()[:2000])
    assert "is not a whole OpenVINO model" in fails(ready)[0]


def test_one_that_is_no_language_model_is_refused(fails: Fails, ready: Path) -> None:
    for name in ("xml", "bin"):
        shutil.copyfile(ready / f"openvino_detokenizer.{name}", ready / f"openvino_model.{name}")
    assert "cannot be served with paged attention" in fails(ready)[0]


@pytest.mark.parametrize(("name", "stored"), [("base", "fp32"), ("small", "int8"), ("rounded", "bf16")])
def test_the_format_of_the_weights_is_read_from_the_model(exported: Workshop, name: str, stored: str) -> None:
    assert stored_format(exported.repository / name) == stored
