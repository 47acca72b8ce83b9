"""A folder that holds an OpenVINO IR already: it is registered as it is, not converted.

Owns: which files of it are taken, what it must have, and how its weights are stored.
Does not know: where it goes. Nothing here needs OpenVINO: the IR's XML says the types of its constants.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from ovms_lora.core.errors import ExportError
from ovms_lora.export.weight_format import WeightFormat

_TAKEN: Final = ("*.json", "*.jinja", "*.model", "*.txt", "openvino_*.xml", "openvino_*.bin")
_OURS: Final = frozenset({"ovms_lora_manifest.json"})
_NEEDED: Final = ("openvino_model.bin", "config.json", "tokenizer.json")
_FORMATS: Final = {
    **dict.fromkeys(("u4", "i4"), WeightFormat.INT4),
    **dict.fromkeys(("u8", "i8"), WeightFormat.INT8),
    "f16": WeightFormat.FP16,
    "bf16": WeightFormat.BF16,
    "f32": WeightFormat.FP32,
}
_SHARE: Final = 0.05  # of all bytes: above it, constants of a compressed type are weights and not small tables


def openvino_files(folder: Path) -> list[Path]:
    """List the files of a model folder that are registered: the IRs, the tokenizer, the configuration."""
    found = {path for pattern in _TAKEN for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name not in _OURS)


def check_openvino_folder(given: str, folder: Path) -> None:
    """Raise ExportError unless the folder has all that serving takes."""
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise ExportError(
                f"{given} is an OpenVINO model without {name}", hint="it is registered as it is, so it must be whole"
            )


def stored_format(folder: Path) -> WeightFormat:
    """Return how the IR stores its weights: the most compressed type that holds a fair share of its bytes.

    Raises ExportError for an IR that cannot be read, or has no weights of a known type.
    """
    sizes: Counter[WeightFormat] = Counter()
    path = folder / "openvino_model.xml"
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "layer":
                data = element.find("data")
                weight_format = _FORMATS.get(data.get("element_type", "")) if data is not None else None
                if element.get("type") == "Const" and data is not None and weight_format is not None:
                    sizes[weight_format] += int(data.get("size", "0"))
                element.clear()
    except (ElementTree.ParseError, ValueError) as error:
        raise ExportError(f"{path} is not a whole OpenVINO model: {error}") from error
    if not sizes.total():
        raise ExportError(f"{path} has no weights of a known type")
    large = [weight_format for weight_format, size in sizes.items() if size >= _SHARE * sizes.total()]
    return min(large, key=lambda weight_format: (weight_format.bits, -sizes[weight_format]))
