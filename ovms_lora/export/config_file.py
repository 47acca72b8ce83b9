"""config.json as the exporter changes it: one entry added, updated or taken out, all else kept as it is.

Owns: reading it early, the lock, the atomic write.
Does not know: what a model folder holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from ovms_lora.core.config import CompositeEntry, parse_server_config
from ovms_lora.core.errors import ConfigError
from ovms_lora.export.publish import sync_folder

_LIST: Final = "model_config_list"
_LOCK_SECONDS: Final = 30.0
_HINT: Final = "repair or remove it, or name another with --config_file_path"


@dataclass(frozen=True, slots=True)
class Registration:
    """What one export adds: a model, and perhaps runtime adapters (alias, folder, alpha) and composites.

    `max_lora_rank` is set where the server's default is too small for the adapters.
    """

    name: str
    folder: Path
    adapters: tuple[tuple[str, Path, float], ...] = ()
    composites: tuple[CompositeEntry, ...] = ()
    max_lora_rank: int | None = None


def check_registration(config_file: Path, registration: Registration) -> None:
    """Raise ConfigError if `register` would fail: the file is broken, or a name in it is taken otherwise."""
    _changed(config_file, registration)


def registration_changes(config_file: Path, registration: Registration) -> bool:
    """Return whether `register` would change the file. Raises ConfigError."""
    before, after = _changed(config_file, registration)
    return before != after or not config_file.exists()


def register(config_file: Path, registration: Registration) -> bool:
    """Add or update the model's entry; returns whether the file changed. Raises ConfigError."""
    config_file = config_file.resolve()  # a link stays one
    config_file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(config_file):
        before, document = _changed(config_file, registration)
        if document == before and config_file.exists():
            return False
        _write(config_file, document)
    return True


def unregister(config_file: Path, name: str, folder: Path) -> dict[str, Any] | None:
    """Take the entry of a model out and return it, None where there is none.

    Raises ConfigError for an entry of that name that is about another folder.
    """
    config_file = config_file.resolve()
    if not config_file.exists():
        return None
    with _locked(config_file):
        document = _read(config_file)
        items = document.get(_LIST, [])
        item = next((item for item in items if item["config"].get("name") == name), None)
        if item is None:
            return None
        entry: dict[str, Any] = item["config"]
        place = (config_file.parent / str(entry.get("base_path"))).resolve()
        if place != folder.resolve():
            raise ConfigError(f"{config_file}: {name!r} is {place}, not {folder}", hint="name the right repository")
        items.remove(item)
        _write(config_file, document)
    return entry


def read_entries(config_file: Path) -> list[dict[str, Any]]:
    """Return the entries as they stand in the file, none where there is no file. Raises ConfigError."""
    return [item["config"] for item in _read(config_file).get(_LIST, [])]


@contextmanager
def _locked(config_file: Path) -> Iterator[None]:
    try:
        with FileLock(config_file.with_name(f".{config_file.name}.lock"), timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise ConfigError(f"{config_file} is locked by another process", hint="run the same command again") from error


def _changed(config_file: Path, registration: Registration) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the document as it is, and as it will be."""
    before = _read(config_file)
    document = json.loads(json.dumps(before))
    entries = document.setdefault(_LIST, [])
    entry = next((item["config"] for item in entries if item["config"].get("name") == registration.name), None)
    if entry is None:
        entry = {"name": registration.name}
        entries.append({"config": entry})
    folder = config_file.resolve().parent
    entry["base_path"] = _relative(registration.folder, folder)
    _put(
        entry,
        "lora_adapters",
        (
            {"alias": alias, "path": _relative(path, folder), "alpha": alpha}
            for alias, path, alpha in registration.adapters
        ),
    )
    _put(entry, "composite_lora_adapters", (item.model_dump(exclude_none=True) for item in registration.composites))
    if registration.max_lora_rank is not None:
        _raise_rank(entry, registration.max_lora_rank)
    _refuse_new_faults(before, document, config_file)
    return before, document


def _put(entry: dict[str, Any], key: str, items: Iterable[dict[str, Any]]) -> None:
    """Put items into a list of the entry, in the place of those with the same alias."""
    for item in items:
        present = entry.setdefault(key, [])
        place = next((i for i, old in enumerate(present) if old.get("alias") == item["alias"]), len(present))
        present[place : place + 1] = [item]


def _raise_rank(entry: dict[str, Any], rank: int) -> None:
    options = entry.setdefault("lora_options", {})
    limit = options.setdefault("max_lora_rank", rank)
    if isinstance(limit, int) and limit < rank:
        raise ConfigError(
            f"an adapter has rank {rank}, and lora_options of {entry['name']!r} allows {limit}",
            hint="raise max_lora_rank in the configuration file",
        )


def _refuse_new_faults(before: dict[str, Any], after: dict[str, Any], config_file: Path) -> None:
    """Raise ConfigError if the server takes the file now and would not take it then.

    A file with keys that the server does not know may belong to another server, and is left to it.
    """
    try:
        parse_server_config(json.dumps(before), origin=str(config_file))
    except ConfigError:
        return
    parse_server_config(json.dumps(after), origin=str(config_file))


def _read(config_file: Path) -> dict[str, Any]:
    if not config_file.exists():
        return {_LIST: []}
    try:
        document = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{config_file} is not valid JSON: {error}", hint=_HINT) from error
    except OSError as error:
        raise ConfigError(f"cannot read {config_file}: {error.strerror}", hint=_HINT) from error
    if not isinstance(document, dict) or not isinstance(document.get(_LIST, []), list):
        raise ConfigError(f"{config_file} has no list {_LIST!r}", hint=_HINT)
    for item in document.get(_LIST, []):
        if not isinstance(item, dict) or not isinstance(item.get("config"), dict):
            raise ConfigError(f'{config_file}: every item of {_LIST} must be {{"config": {{…}}}}', hint=_HINT)
    return document


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder)).as_posix()


def _write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file in one step; the lock must be held, so that nobody else writes the same new file."""
    new = path.with_name(f".{path.name}.new")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path.parent)
