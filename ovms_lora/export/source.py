"""Where a model, a tokenizer or an adapter comes from: a folder, a `.gguf` file or a hub id.

Owns: telling these apart, and the checks that need no torch.
Does not know: how a model is fetched, loaded or converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from ovms_lora.core.errors import ExportError
from ovms_lora.export import hub
from ovms_lora.export.digests import file_digest, files_digest
from ovms_lora.export.openvino_folder import check_openvino_folder, openvino_files

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
TOKENIZER_PATTERNS: Final = ("*.json", "*.jinja", "*.model", "*.txt")
_MODEL_PATTERNS: Final = (*TOKENIZER_PATTERNS, "*.safetensors", "openvino_*.xml", "openvino_*.bin")
_MEANINGFUL: Final = frozenset({".json", ".safetensors", ".jinja", ".model", ".txt", ".py"})


class SourceKind(StrEnum):
    """What a model source is."""

    FOLDER = "folder"
    GGUF = "gguf"
    OPENVINO = "openvino"


@dataclass(frozen=True, slots=True)
class Source:
    """A model source that exists; `given` is what the user wrote."""

    given: str
    kind: SourceKind
    path: Path

    @property
    def files(self) -> list[Path]:
        """The files that decide what an export gives."""
        match self.kind:
            case SourceKind.GGUF:
                return [self.path]
            case SourceKind.OPENVINO:
                return openvino_files(self.path)
            case SourceKind.FOLDER:
                return content_files(self.path)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files of a folder that transformers loads."""
        return weight_files(self.path)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def digest(self, advance: Callable[[int], None]) -> str:
        """Return the identity of the content, wherever it lies; `advance` is told the bytes read."""
        if self.kind is SourceKind.GGUF:
            return file_digest(self.path, advance)
        return files_digest(self.files, self.path, advance)

    @property
    def default_name(self) -> str:
        """The model name where the user gives none."""
        if self.kind is SourceKind.GGUF:
            return self.path.stem
        return self.path.resolve().name if Path(self.given).exists() else self.given


def find_model(given: str, *, trust_remote_code: bool = False) -> Source:
    """Find a model source. Raises ExportError if there is none, or none that can be exported."""
    path = Path(given)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ExportError(f"{given} is a file, but not a .gguf", hint="--source_model takes a folder or a .gguf")
        if path.open("rb").read(4) != b"GGUF":
            raise ExportError(f"{given} is not a GGUF file")
        return Source(given, SourceKind.GGUF, path)
    folder = find_folder(given, "model", model_patterns(trust_remote_code=trust_remote_code))
    if (folder / "openvino_model.xml").is_file():
        check_openvino_folder(given, folder)
        return Source(given, SourceKind.OPENVINO, folder)
    _check_model_folder(given, folder)
    return Source(given, SourceKind.FOLDER, folder)


def model_patterns(*, trust_remote_code: bool) -> tuple[str, ...]:
    """Return which of a hub repository's files a model is made of."""
    return (*_MODEL_PATTERNS, "*.py") if trust_remote_code else _MODEL_PATTERNS


def find_tokenizer(given: str) -> Path:
    """Find the folder of a tokenizer. Raises ExportError."""
    folder = find_folder(given, "tokenizer", TOKENIZER_PATTERNS)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ExportError(f"{given} holds no tokenizer", hint="it must hold tokenizer.json")
    return folder


def find_folder(given: str, what: str, patterns: tuple[str, ...]) -> Path:
    """Return the local folder, or fetch the hub id's files that match `patterns`. Raises ExportError."""
    return Path(given) if is_local(given, what) else hub.fetch(given, what, patterns)


def is_local(given: str, what: str) -> bool:
    """Return whether a source is a folder here; else it is a hub id. Raises ExportError for what is neither."""
    path = Path(given)
    if path.is_dir():
        return True
    if path.exists():
        raise ExportError(f"{given} is not a folder", hint=f"a {what} is a folder or a hub id")
    if not _HUB_ID.fullmatch(given):
        raise ExportError(f"no such {what}: {given}", hint="check the path; a hub id looks like `org/name`")
    return False


def content_files(folder: Path) -> list[Path]:
    """List the files of a model, tokenizer or adapter folder that have a meaning, without read-mes and the like."""
    return sorted(path for path in folder.iterdir() if path.suffix in _MEANINGFUL and path.is_file())


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers loads from a folder: those of the index, or the one of the name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / str(name) for name in read_json(index).get("weight_map", {}).values()})
    return [folder / "model.safetensors"]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ExportError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ExportError(f"{path} must hold a JSON object")
    return document


def tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all tensors from the headers of safetensors files. Raises ExportError for a broken file."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ExportError(f"{path} is not a whole safetensors file: {error}", hint="fetch it again") from error
    return shapes


def _check_model_folder(given: str, folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ExportError(f"{given} is an adapter, not a model", hint="give it with --adapter or --source_loras")
    if not (folder / "config.json").is_file():
        raise ExportError(f"{given} is not a model folder: it has no config.json")
    read_json(folder / "config.json")
    missing = [path for path in weight_files(folder) if not path.is_file()]
    if not missing:
        return
    if any(folder.glob("*.safetensors")):
        raise ExportError(f"{given} is incomplete: {missing[0].name} is missing", hint="fetch the model again")
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    reason = "its weights are pickled" if pickled else f"it has no {missing[0].name}"
    raise ExportError(f"{given} cannot be exported: {reason}", hint="save the model as safetensors")
