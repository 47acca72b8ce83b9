"""`ovms-lora remove`: one exported model leaves config.json and the disk.

Owns: what may be removed, and the order: the server first hears that the model is gone, then the folder goes.
Does not know: what the folder holds beyond its manifest.

Killed at any point, the model is whole and served, whole and unknown to the server, or gone; the same command again
ends what was begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ovms_lora.core.errors import ConfigError, ExportError, UsageError
from ovms_lora.core.names import check_model_name
from ovms_lora.export.config_file import unregister
from ovms_lora.export.manifest import MANIFEST_NAME, read_manifest
from ovms_lora.export.publish import discard, locked


def remove(name: str, repository: Path, config_file: Path) -> Iterator[str]:
    """Remove a model and yield what was done. Raises OvmsLoraError for what this exporter did not write."""
    try:
        check_model_name(name)
    except ConfigError as error:
        raise UsageError(error.message, hint=error.hint) from error
    folder = repository / name
    _check_ours(folder, name)
    with locked(repository, name):
        _check_ours(folder, name)
        entry = unregister(config_file, name, folder)
        if entry is not None:
            yield f"{config_file} no longer names {name}"
        discard(repository, name)
    yield f"removed {folder}"
    for adapter in (entry or {}).get("lora_adapters", []):
        yield f"left {adapter['path']}: adapters may serve other models too"


def _check_ours(folder: Path, name: str) -> None:
    """Raise ExportError unless the folder is an export of this name, with nothing of someone else's within."""
    if folder.is_symlink() or not folder.is_dir():
        raise ExportError(f"there is no model {name!r} in {folder.parent}", hint="ovms-lora list says what there is")
    manifest = read_manifest(folder)
    if manifest is None:
        raise ExportError(f"{folder} was not written by this exporter", hint="remove it yourself, if it is to go")
    if manifest.name != name:
        raise ExportError(f"{folder} is an export of {manifest.name!r}", hint="it was moved; remove it yourself")
    known = {MANIFEST_NAME, *manifest.files}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).as_posix() not in known and not path.is_dir():
            raise ExportError(f"{path} is not part of the export", hint="move it away, then remove the model")
