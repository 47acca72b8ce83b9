"""ovms_lora_manifest.json: what an exported folder is made of and holds.

Owns: the file's shape, writing and reading it, and in what two exports differ.
Does not know: how anything in it came about.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from ovms_lora.core.errors import ExportError

MANIFEST_NAME: Final = "ovms_lora_manifest.json"
_PACKAGES: Final = ("ovms-lora", "openvino", "optimum-intel", "nncf", "peft", "transformers", "torch", "tokenizers")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecord(_Frozen):
    """Where something came from, as the user named it, and the digest of what was there."""

    source: str
    digest: str


class MergedAdapter(SourceRecord):
    """An adapter in the weights, in the order of merging."""

    weight: float


class Recipe(_Frozen):
    """All that decides what an export gives: two exports with equal recipes are the same request."""

    source: SourceRecord
    weight_format: str
    compression: dict[str, Any] = {}
    calibration: SourceRecord | None = None
    adapters: tuple[MergedAdapter, ...] = ()
    tokenizer: SourceRecord | None = None
    draft: SourceRecord | None = None
    engine: dict[str, Any] = {}

    def differences(self, other: Recipe) -> list[str]:
        """Say what `other` has otherwise, as `what: here → there`; sources are compared by content, not by path."""
        found = []
        if self.source.digest != other.source.digest:
            found.append(f"source: {self.source.source} → {other.source.source}")
        if self.weight_format != other.weight_format:
            found.append(f"weight format: {self.weight_format} → {other.weight_format}")
        if [(a.digest, a.weight) for a in self.adapters] != [(a.digest, a.weight) for a in other.adapters]:
            found.append(f"adapters: {_listed(self.adapters)} → {_listed(other.adapters)}")
        for what, one, two, none in (
            ("tokenizer", self.tokenizer, other.tokenizer, "the source's"),
            ("dataset", self.calibration, other.calibration, "none"),
            ("draft model", self.draft, other.draft, "none"),
        ):
            if (one and one.digest) != (two and two.digest):
                found.append(f"{what}: {one.source if one else none} → {two.source if two else none}")
        for ours, theirs in ((self.compression, other.compression), (self.engine, other.engine)):
            for key in sorted({*ours, *theirs}):
                here, there = ours.get(key), theirs.get(key)
                if here != there:
                    found.append(f"{key}: {json.dumps(here)} → {json.dumps(there)}")
        return found


class Drift(_Frozen):
    """How far the IR is from its PyTorch model: Kullback-Leibler divergences in nats, and the share of positions at
    which both hold the same token for the likeliest."""

    mean_kl: float
    max_kl: float
    top1_agreement: float
    positions: int

    def __str__(self) -> str:
        return (
            f"KL divergence {self.mean_kl:.2g} on average and {self.max_kl:.2g} at most, "
            f"same likeliest token at {self.top1_agreement:.1%} of {self.positions} positions"
        )


class FileRecord(_Frozen):
    """One file of the folder."""

    size: int
    sha256: str


class Manifest(_Frozen):
    """The whole file."""

    format: int = 1
    name: str
    recipe: Recipe
    verified: Drift | None = None
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def damage(self, folder: Path) -> str | None:
        """Say which file of the folder is missing or of another size, None for a whole one (contents unread)."""
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != record.size:
                return f"{name} has {path.stat().st_size} bytes, not {record.size}"
        return None


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder, None where there is none. Raises ExportError for one that cannot be read."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ExportError(
            f"{path} cannot be read: {where}: {first['msg']}", hint="--overwrite_models exports the model again"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a folder that is not published yet."""
    text = manifest.model_dump_json(indent=2)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that make an export what it is."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return found


def _listed(adapters: tuple[MergedAdapter, ...]) -> str:
    return ", ".join(f"{adapter.source}={adapter.weight:g}" for adapter in adapters) or "none"
