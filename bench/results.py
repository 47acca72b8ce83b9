"""Results: one JSON file for each part and model in bench/results/, which names the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.part import Row

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("openvino", "openvino-genai", "llama-cpp-python", "torch", "transformers", "peft", "numpy")


@dataclass(frozen=True, slots=True)
class Result:
    """The rows of one part for one model."""

    part: str
    model: str
    rows: Sequence[Row]
    machine: Mapping[str, Any]

    def where(self, **wanted: str | float) -> Sequence[Row]:
        """Return the rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]


def machine() -> dict[str, Any]:
    """Name the machine and what runs on it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write results to bench/results/, with the machine's name."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    return path


def write_part(part: str, model: str, rows: Sequence[Row], *, long: bool) -> Path:
    """Write the rows of a part."""
    return write_results(f"{part}-{model}", {"part": part, "model": model, "long": long, "rows": list(rows)})


def read_parts(folder: Path = RESULTS) -> list[Result]:
    """Return the results of all parts that have been measured."""
    found = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if "part" in values:
            found.append(Result(values["part"], values["model"], values["rows"], values["machine"]))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
