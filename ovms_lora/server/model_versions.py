"""Version folders: a `base_path` of OVMS may hold `1/`, `2/`, … instead of the model itself.

Requests name no version, so one of them is served: the highest that may be.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VersionFolder:
    """Where the served version lies; a folder without versions is version 1, as a graph is in OVMS."""

    folder: Path
    version: int = 1


def find_version(folder: Path, allowed: Collection[int] | None = None) -> VersionFolder:
    """Return the highest version of a folder, of those that are allowed; None allows all.

    An allowed version that is not there is returned too: loading it says what is missing.
    """
    present = {int(path.name): path for path in _folders(folder) if _is_version(path.name)}
    if not present or (folder / "graph.pbtxt").exists() or (folder / "openvino_model.xml").exists():
        return VersionFolder(folder)
    served = max((version for version in present if allowed is None or version in allowed), default=None)
    if served is None:
        served = max(allowed or ())
        return VersionFolder(folder / str(served), served)
    return VersionFolder(present[served], served)


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit() and not name.startswith("0") and len(name) <= 18
