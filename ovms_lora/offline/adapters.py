"""RequestedAdapters: from the LoRARequests of one LLM to adapters of its runtime, loaded when first asked for.

An adapter is told by its folder; names and numbers lead to folders, and never to another one later:

    lora_int_id ─┐
                 ├──► folder ──► alias in the runtime, and how its files looked when they were loaded
    lora_name ───┘
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from ovms_lora.core.errors import ArgumentError, OvmsLoraError
from ovms_lora.core.request import AdapterUse
from ovms_lora.engine.lora_config import AdapterSpec
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.offline.lora_request import LoRARequest

_FILES = ("adapter_config.json", "adapter_model.safetensors")

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    alias: str
    stamp: _Stamp


class RequestedAdapters:
    """Thread-safe. Loading reads files and may compile a graph: it blocks for that long."""

    def __init__(self, runtime: LoraRuntime) -> None:
        self._runtime = runtime
        self._changing = threading.Lock()
        self._loaded: dict[Path, _Loaded] = {}
        self._by_id: dict[int, Path] = {}
        self._by_name: dict[str, Path] = {}

    def load(self, request: LoRARequest) -> None:
        """See that the adapter can be used.

        Raises ArgumentError when the folder is missing, is no adapter for this model or has changed since it was
        loaded, and when number or name stand for another folder.
        """
        folder = _folder(request)
        with self._changing:
            _check_same_folder(f"lora_int_id {request.lora_int_id}", self._by_id.get(request.lora_int_id), folder)
            _check_same_folder(f"lora_name {request.lora_name!r}", self._by_name.get(request.lora_name), folder)
            known, stamp = self._loaded.get(folder), _stamp(folder)
            if known is None:
                self._loaded[folder] = self._load(request, folder, stamp)
            elif known.stamp != stamp:
                raise ArgumentError(
                    f"the adapter in {folder} has changed or gone since it was loaded",
                    hint="give another version a folder, a name and a lora_int_id of its own",
                )
            self._by_id[request.lora_int_id] = self._by_name[request.lora_name] = folder

    def uses(self, request: LoRARequest) -> tuple[AdapterUse, ...]:
        """Return what the engine needs of an adapter that was loaded, read from its folder again where needed.

        Raises ArgumentError when that fails.
        """
        try:
            return self._runtime.select(self._loaded[_folder(request)].alias)
        except OvmsLoraError as error:
            raise _failure(request, error) from error

    def _load(self, request: LoRARequest, folder: Path, stamp: _Stamp) -> _Loaded:
        # Names are the caller's and may be any string, so the runtime gets others.
        alias = f"adapter-{len(self._loaded)}"
        try:
            self._runtime.load(AdapterSpec(alias, folder))
        except OvmsLoraError as error:
            raise _failure(request, error) from error
        return _Loaded(alias, stamp)


def _folder(request: LoRARequest) -> Path:
    return Path(os.path.realpath(Path(request.path).expanduser()))


def _check_same_folder(what: str, known: Path | None, folder: Path) -> None:
    if known is not None and known != folder:
        raise ArgumentError(
            f"{what} stands for {known} already, and cannot stand for {folder}",
            hint="give each adapter a name and a lora_int_id of its own",
        )


def _stamp(folder: Path) -> _Stamp:
    """Return what changes when one of the adapter's files is written, replaced or removed."""
    return tuple(_file_stamp(folder / name) for name in _FILES)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _failure(request: LoRARequest, error: OvmsLoraError) -> ArgumentError:
    return ArgumentError(f"Loading lora {request.lora_name} failed: {error.message}", hint=error.hint)
