"""What adapters take of memory: the resident size of a process that serves a model and has answered a batch.

python -m bench.memory MODEL FOLDER… [--max_loras N] [--use N]

serves the model with these adapters, answers a batch that uses the first N of them, and prints its size.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

from bench.batches import case
from bench.models import ROOT
from bench.part import Plan, Row
from bench.workload import Server, base_linears, write_adapters
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.model import read_options

_RESIDENT = 8
_BATCH = 16
_MEGABYTE = 2**20


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure processes with growing numbers of adapters."""
    adapters = list(write_adapters(plan.folder, base_linears(model), plan.registered[-1]).values())
    beside = GraphSource(*read_options(model)).affords_plain
    rows: list[Row] = [{"case": "plain", "registered": 0, "resident": 0, "megabytes": _of_process(model, [], 0)}]
    for count in plan.registered:
        most = min(count, _RESIDENT)
        for resident in (0, most) if plan.long else (most,):
            megabytes = _of_process(model, adapters[:count], resident)
            case_name = "adapters, plain graph beside" if beside else "adapters"
            rows.append({"case": case_name, "registered": count, "resident": resident, "megabytes": megabytes})
    return rows


def _of_process(model: Path, adapters: list[Path], use: int) -> float:
    command = [sys.executable, "-m", "bench.memory", str(model), *map(str, adapters), "--use", str(use)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Serve, answer, print the size in megabytes."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path, nargs="*")
    parser.add_argument("--use", type=int, default=0)
    given = parser.parse_args()
    adapters = {f"a{index}": folder for index, folder in enumerate(given.adapters)}
    names = [f"a{index % given.use}" if given.use else None for index in range(_BATCH)]
    with Server(given.model, adapters or None, max_loras=_RESIDENT, max_cpu_loras=max(len(adapters), 1)) as server:
        case(server, names, 8)(0)
        gc.collect()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    print(int(kilobytes) * 1024 / _MEGABYTE)


if __name__ == "__main__":
    main()
