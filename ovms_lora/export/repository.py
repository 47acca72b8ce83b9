"""`ovms-lora list`: what a model repository holds, by the manifests in it and by config.json.

Owns: finding the exported folders, and the rows and JSON that describe them. Reads only.
Does not know: models that another program put there; they have no manifest, and are not listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovms_lora.core.errors import ExportError
from ovms_lora.export.config_file import read_entries
from ovms_lora.export.manifest import MANIFEST_NAME, Manifest, read_manifest
from ovms_lora.export.publish import HIDDEN


@dataclass(frozen=True, slots=True)
class Listed:
    """One exported folder; `entry` is what config.json says of it, None where it is not named there."""

    folder: Path
    manifest: Manifest
    entry: dict[str, Any] | None

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def status(self) -> str:
        """Whether it can be served: `ok`, `not in config.json`, or what is wrong."""
        if damage := self.manifest.damage(self.folder):
            return f"damaged: {damage}"
        return "ok" if self.entry else "not in config.json"

    def as_json(self) -> dict[str, Any]:
        """Return all that is known, with the manifest's names."""
        manifest = self.manifest
        recipe = manifest.recipe.model_dump(mode="json")
        return {
            "name": manifest.name,
            "folder": str(self.folder),
            "status": self.status,
            "size": self.size,
            **{key: recipe[key] for key in ("source", "weight_format", "compression", "adapters")},
            "verified": manifest.verified.model_dump() if manifest.verified else None,
            "lora_adapters": (self.entry or {}).get("lora_adapters", []),
            "composite_lora_adapters": (self.entry or {}).get("composite_lora_adapters", []),
        }


def find_exports(repository: Path, config_file: Path) -> list[Listed]:
    """Return the exported folders of a repository, by name. Raises ExportError and ConfigError."""
    if not repository.is_dir():
        raise ExportError(f"there is no repository {repository}", hint="name it with --model_repository_path")
    entries = {entry.get("name"): entry for entry in read_entries(config_file)}
    paths = sorted(repository.rglob(MANIFEST_NAME))
    folders = [path.parent for path in paths if HIDDEN not in path.relative_to(repository).parts]
    manifests = [(folder, read_manifest(folder)) for folder in folders]
    return [Listed(folder, manifest, entries.get(manifest.name)) for folder, manifest in manifests if manifest]


def describe(repository: Path, config_file: Path, *, as_json: bool) -> Iterator[str]:
    """Yield a table of the repository, or one JSON array. Raises as `find_exports`."""
    exports = find_exports(repository, config_file)
    if as_json:
        yield json.dumps([export.as_json() for export in exports], indent=2, ensure_ascii=False)
        return
    head = ("NAME", "FORMAT", "SIZE", "SOURCE", "MERGED", "RUNTIME", "DRIFT", "STATUS")
    rows = [head, *(_row(export) for export in exports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(export: Listed) -> tuple[str, ...]:
    recipe, drift = export.manifest.recipe, export.manifest.verified
    entry = export.entry or {}
    beside = [*entry.get("lora_adapters", []), *entry.get("composite_lora_adapters", [])]
    return (
        export.manifest.name,
        recipe.weight_format,
        f"{export.size / 1e6:.1f} MB",
        _short(recipe.source.source),
        ", ".join(f"{_short(adapter.source)}={adapter.weight:g}" for adapter in recipe.adapters) or "-",
        ", ".join(item["alias"] for item in beside) or "-",
        f"{drift.mean_kl:.2g}" if drift else "-",
        export.status,
    )


def _short(source: str) -> str:
    """Return a hub id or a relative path as it is, and the last part of an absolute path."""
    return Path(source).name if Path(source).is_absolute() else source
