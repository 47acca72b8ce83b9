"""What nncf leaves in the IR for each choice of `--extra_quantization_params`, on the tiny Llama."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovms_lora.core.errors import ExportError
from ovms_lora.export.compress import compress
from ovms_lora.export.compression import parse_compression
from ovms_lora.export.convert import check_ir
from ovms_lora.export.openvino_folder import stored_format
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.weight_format import WeightFormat
from tests.export import oracle
from tests.export.conftest import Fails, Sources, Workshop


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "samples.txt"
    path.write_text("Once upon a time there was a king.\n\nSELECT icao FROM airports\n" * 4, encoding="utf-8")
    return path


def compressed(exported: Workshop, to: Path, weight_format: str, text: str) -> Path:
    """Compress a copy of the fp32 export."""
    folder, work = to / "model", to / "work"
    work.mkdir()
    shutil.copytree(exported.repository / "base", folder)
    with ExportProgress().silence():
        compress(folder, work, WeightFormat(weight_format), parse_compression(text))
    assert list(work.iterdir()) == []
    return folder


def constants(folder: Path) -> Counter[str]:
    """Count the constants of more than one row by type."""
    from ovms_lora.export.device import openvino_core

    model = openvino_core().read_model(folder / "openvino_model.xml")
    found: Any = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) > 1]
    return Counter(op.get_element_type().get_type_name() for op in found if op.shape[0] > 1)


@pytest.mark.parametrize(
    ("weight_format", "text", "kinds"),
    [
        ("int8", "", {"u8"}),
        ("int8", "--sym", {"i8"}),
        ("int4", "--group-size 32", {"u4", "u8"}),
        ("int4", "--group-size 32 --sym --all-layers", {"i4"}),
        ("int4", "--group-size -1 --sym --backup-precision int8_sym", {"i4", "i8"}),
        ("int4", "--group-size 32 --awq", {"u4", "u8"}),
        ("int4", "--group-size 32 --ratio 0.5 --dataset DATA", {"u4", "u8"}),
        ("int4", "--group-size 32 --scale-estimation --awq --num-samples 2 --dataset DATA", {"u4", "u8"}),
    ],
)
def test_the_weights_are_stored_as_asked_and_still_computed(
    exported: Workshop, sources: Sources, tmp_path: Path, dataset: Path, weight_format: str, text: str, kinds: set[str]
) -> None:
    folder = compressed(exported, tmp_path, weight_format, text.replace("DATA", str(dataset)))
    stored = {kind for kind in constants(folder) if kind in ("u4", "i4", "u8", "i8")}
    assert stored == kinds
    assert stored_format(folder) == weight_format
    check_ir(folder)
    difference = oracle.of_ir(folder) - oracle.of_torch(oracle.plain(sources.base))
    assert np.abs(difference).mean() < (0.1 if weight_format == "int8" else 1.0)


def test_a_smaller_ratio_leaves_more_layers_in_int8(exported: Workshop, tmp_path: Path) -> None:
    counts = []
    for ratio in ("1.0", "0.3"):
        (tmp_path / ratio).mkdir()
        folder = compressed(exported, tmp_path / ratio, "int4", f"--group-size 32 --ratio {ratio}")
        counts.append(constants(folder)["u4"])
    assert counts[0] > counts[1] > 0


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "holds no text"), (b"\xff\xfe", "is not UTF-8 text")])
def test_a_dataset_without_text_is_refused(exported: Workshop, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "samples.txt").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        compressed(exported, tmp_path, "int4", f"--awq --dataset {tmp_path / 'samples.txt'}")


def test_a_group_size_that_fits_no_layer_is_an_error_of_the_export(exported: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the model cannot be compressed"):
        compressed(exported, tmp_path, "int4", "--group-size 48 --group-size-fallback error")


def test_other_options_or_samples_are_another_export(
    workshop: Workshop, sources: Sources, quick: None, fails: Fails, dataset: Path
) -> None:
    flags = ["--weight-format", "int4", "--extra_quantization_params"]
    assert workshop.export(sources.base, *flags, f"--awq --dataset {dataset}") == 0
    assert workshop.export(sources.base, *flags, f"--dataset={dataset} --awq") == 0
    assert "group_size: null → 64" in fails(sources.base, *flags, f"--awq --group-size 64 --dataset {dataset}")[0]
    dataset.write_text("other text")
    assert f"dataset: {dataset} → {dataset}" in fails(sources.base, *flags, f"--awq --dataset {dataset}")[0]
