"""How long a start takes: of the server to ready, without and with compiled models kept, and of its import."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.models import ROOT
from bench.part import Plan, Row
from bench.served import served, write_config
from bench.workload import base_linears, write_adapters

_ADAPTERS = 8
_SHORT_STARTS = 2
_MODULES = ("ovms_lora.server", "ovms_lora.server.app")
_IMPORT = """
import sys, time
begin = time.perf_counter()
import {module}
print(time.perf_counter() - begin, "torch" in sys.modules)
"""


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure starts and imports."""
    adapters = write_adapters(plan.folder, base_linears(model), _ADAPTERS)
    kept = json.dumps({"CACHE_DIR": str(plan.folder / "compiled")})
    plain = ["--model_path", str(model), "--model_name", "m"]
    config = write_config(plan.folder, model, adapters, max_loras=_ADAPTERS)
    return [
        _start("no cache", plain, plan),
        _start("first start, fills the cache", [*plain, "--plugin_config", kept], plan, times=1),
        _start("second start", [*plain, "--plugin_config", kept], plan),
        _start(f"{_ADAPTERS} adapters, no cache", ["--config_path", str(config)], plan),
        *(_import(module, plan.rounds) for module in _MODULES),
    ]


def _start(name: str, arguments: list[str], plan: Plan, *, times: int | None = None) -> Row:
    """Return the median time from the start of the process to `ready`."""
    found = []
    for _ in range(times or (plan.rounds if plan.long else _SHORT_STARTS)):
        begin = time.perf_counter()
        with served(*arguments):
            found.append(time.perf_counter() - begin)
    return {"case": name, "seconds": statistics.median(found), "low": min(found), "high": max(found)}


def _import(module: str, rounds: int) -> Row:
    command = [sys.executable, "-c", _IMPORT.format(module=module)]
    found, torch = [], False
    for _ in range(rounds + 2):
        seconds, loads_torch = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()
        found.append(float(seconds))
        torch |= loads_torch == "True"
    row: Row = {"case": f"import {module}", "seconds": statistics.median(found), "low": min(found), "high": max(found)}
    return {**row, "torch": torch}
