"""Which models are to be served: from config.json, or from `--model_path`.

Owns the wanted state as a list of ModelSpec, comparable from one reading to the next. Loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ovms_lora.core.config import ModelEntry, read_server_config
from ovms_lora.core.errors import ConfigError

# A re-export replaces these; their identity tells that the same path holds another model.
_TELLING_FILES = ("openvino_model.xml", "openvino_model.bin", "graph.pbtxt", "ovms_lora_manifest.json")

FileIdentity = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve. Two specs are equal when serving one is serving the other."""

    entry: ModelEntry
    folder: Path
    files: tuple[FileIdentity | None, ...]
    plugin_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name to serve it under."""
        return self.entry.name


class ModelSource(Protocol):
    """Where the wanted models stand."""

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the models to serve. Raises ConfigError."""

    def changed(self) -> bool:
        """Tell whether `read` may return something else than the last time."""


class ConfigFile:
    """The models of a config.json; paths in it are relative to its folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: FileIdentity | None = None

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the models to serve. Raises ConfigError."""
        self._seen = file_identity(self._path)
        config = read_server_config(self._path)
        return tuple(model_spec(entry, self._path.parent / entry.base_path) for entry in config.models)

    def changed(self) -> bool:
        """Tell whether the file is another one than was read last."""
        return file_identity(self._path) != self._seen


class SingleModel:
    """The one model of `--model_path`."""

    def __init__(self, name: str, folder: Path, plugin_config: Mapping[str, Any]) -> None:
        self._entry = ModelEntry(name=name, base_path=str(folder))
        self._folder = folder
        self._plugin_config = plugin_config

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the one model."""
        return (model_spec(self._entry, self._folder, self._plugin_config),)

    def changed(self) -> bool:
        """Nothing is polled: a re-export is taken up by a reload."""
        return False


def model_spec(entry: ModelEntry, folder: Path, plugin_config: Mapping[str, Any] | None = None) -> ModelSpec:
    """Return the spec of one entry. Raises ConfigError for what this server cannot serve."""
    if entry.takes_adapters:
        raise ConfigError(
            f"model {entry.name!r}: runtime adapters are not supported yet", hint="merge the adapters at export"
        )
    folder = folder.absolute()
    files = tuple(file_identity(folder / name) for name in _TELLING_FILES)
    return ModelSpec(entry, folder, files, dict(plugin_config or {}))


def file_identity(path: Path) -> FileIdentity | None:
    """Return what changes when a file is written or replaced; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)
