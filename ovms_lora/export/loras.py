"""Runtime adapters beside a base: checked against it, copied into the repository, named in config.json.

Owns: where they lie (`<repository>/loras/<alias>`), and when one that lies there may be replaced.
Does not know: what makes an adapter good, which `ovms_lora.adapters` says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from ovms_lora.adapters.adapter import inspect_adapter, load_adapter
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.errors import AdapterError, ExportError
from ovms_lora.export.base_linears import read_base_linears
from ovms_lora.export.digests import files_digest
from ovms_lora.export.peft_folder import FILES as ADAPTER_FILES
from ovms_lora.export.publish import locked, publish
from ovms_lora.export.request import RuntimeSource
from ovms_lora.export.source import find_folder

FOLDER: Final = "loras"
_OWN_TEMPLATE: Final = ("chat_template.jinja", "tokenizer_config.json")  # an adapter need not have one
_MAX_RANK: Final = 256


@dataclass(frozen=True, slots=True)
class RuntimeAdapter:
    """An adapter that is one, as far as can be told without a base."""

    alias: str
    source: Path
    alpha: float
    rank: int

    @property
    def place(self) -> str:
        """Where it goes, relative to the repository."""
        return f"{FOLDER}/{self.alias}"


def find_runtime_adapter(wanted: RuntimeSource, repository: Path, *, overwrite: bool) -> RuntimeAdapter:
    """Find and check an adapter. Raises ExportError or AdapterError, naming the alias."""
    folder = find_folder(wanted.source, "adapter", ADAPTER_FILES)
    try:
        with _without_links(folder) as plain:
            rank = inspect_adapter(plain).max_rank
    except AdapterError as error:
        raise _named(wanted.alias, error) from error
    adapter = RuntimeAdapter(wanted.alias, folder, wanted.alpha, rank)
    present = repository / adapter.place
    if present.exists() and not overwrite and not _same(folder, present):
        raise ExportError(
            f"{present} holds another adapter", hint="--overwrite_models replaces it; another alias keeps both"
        )
    return adapter


def stage_adapters(adapters: tuple[RuntimeAdapter, ...], staging: Path, base: Path) -> None:
    """Copy adapters into the staging folder and check the copies against the base's IR. Raises AdapterError."""
    if not adapters:
        return
    linears = read_base_linears(base)
    for adapter in adapters:
        staged = staging / adapter.place
        staged.mkdir(parents=True)
        for path in _files(adapter.source):
            shutil.copyfile(path, staged / path.name)
        try:
            load_adapter(staged, linears, max_lora_rank=_MAX_RANK, lora_dtype=np.float32)
        except AdapterError as error:
            raise _named(adapter.alias, error) from error


def publish_adapters(adapters: tuple[RuntimeAdapter, ...], staging: Path, repository: Path) -> None:
    """Move staged adapters to their places; one that is there with the same content stays untouched."""
    for adapter in adapters:
        with locked(repository, adapter.place):
            if not _same(staging / adapter.place, repository / adapter.place):
                publish(staging / adapter.place, repository, adapter.place)


def rank_beyond_default(adapters: tuple[RuntimeAdapter, ...]) -> int | None:
    """Return the largest rank if the server's default `max_lora_rank` is below it."""
    rank = max((adapter.rank for adapter in adapters), default=0)
    return rank if rank > LoraOptions().max_lora_rank else None


@contextmanager
def _without_links(folder: Path) -> Iterator[Path]:
    """Give the folder, or a copy if its files are links: the hub's cache is made of them, and a server follows none."""
    files = _files(folder)
    if not any(path.is_symlink() for path in files):
        yield folder
        return
    with TemporaryDirectory(prefix="ovms-lora-") as copy:
        for path in files:
            shutil.copyfile(path, Path(copy, path.name))
        yield Path(copy)


def _same(one: Path, other: Path) -> bool:
    ours, theirs = _files(one), _files(other)
    if not {path.name for path in ours} == {path.name for path in theirs} >= set(ADAPTER_FILES):
        return False
    return files_digest(ours, one) == files_digest(theirs, other)


def _files(folder: Path) -> list[Path]:
    """Return the files of an adapter that are there."""
    return [path for name in (*ADAPTER_FILES, *_OWN_TEMPLATE) if (path := folder / name).is_file()]


def _named(alias: str, error: AdapterError) -> AdapterError:
    return AdapterError(error.code, f"adapter {alias!r}: {error.message}", hint=error.hint)
