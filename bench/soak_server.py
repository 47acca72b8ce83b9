"""What the soak asks: a tiny model with adapters, its config.json, `ovms-lora serve` as a process, and its size.

Knows nothing of what clients do with it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.models import ROOT, tiny
from bench.workload import base_linears, write_adapter

_MEGABYTE = 2**20
_START_SECONDS = 120
_STOP_SECONDS = 40  # the server drains for 30
_STRENGTH = 0.4  # of the adapters' random values: enough for other texts than the base's
# Memory grows with every new length of a step, up to a bound (OpenVINO and oneDNN keep what they compile for it, see
# docs/decisions.md), and with every block that is used for the first time. With few of both that is over soon.
_SMALL = ("--max_num_seqs", "8", "--max_num_batched_tokens", "16")
VERSIONS = ("version0", "version1")


@dataclass(frozen=True, slots=True)
class Size:
    """How much the server's processes hold at a time, in seconds of the machine's clock."""

    at: float
    megabytes: float
    descriptors: int
    threads: int
    processes: int


class SoakFolder:
    """A folder with an exported model `base`, adapters, and a config.json that names some of them."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config.json"
        self.loras = folder / "loras"
        self.log = folder / "server.log"
        linears = base_linears(tiny(folder, *_SMALL))
        for seed, name in enumerate(("stay", "guest", *VERSIONS)):
            write_adapter(self.loras / name, linears, rank=4 + 4 * seed, seed=seed, scale=_STRENGTH)
        bad = write_adapter(self.loras / "bad", linears)
        weights = bad / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.write_config(self.described("stay", "guest"))

    def write_config(self, text: str) -> None:
        """Write config.json in place, as an editor that takes no care."""
        self.config.write_text(text, encoding="utf-8")

    def described(self, *adapters: str) -> str:
        """Return a config.json whose base has these adapters, and `mix` of the first."""
        mix = {"alias": "mix", "components": [{"adapter_alias": adapters[0], "alpha": 0.5}]}
        entry: dict[str, Any] = {
            "name": "base",
            "base_path": "base",
            "lora_adapters": [{"alias": name, "path": f"loras/{name}"} for name in adapters],
            "composite_lora_adapters": [mix],
            "lora_options": {"max_loras": 3, "max_cpu_loras": 3},
        }
        return json.dumps({"model_config_list": [{"config": entry}]})


class SoakServer:
    """A running server; use it in `with`."""

    def __init__(self, folder: SoakFolder) -> None:
        command = [sys.executable, "-m", "ovms_lora.cli", "serve", "--config_path", str(folder.config)]
        command += ["--rest_port", "0", "--allow-runtime-lora-updating", "--lora-path-prefix", str(folder.loras)]
        self._log = folder.log
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def __enter__(self) -> SoakServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def url(self) -> str:
        """Wait until the server is ready; return its address."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"^ready: (\S+)", self.log, re.MULTILINE)
            if found:
                return found[1]
            time.sleep(0.05)
        raise SystemExit(f"the server did not start:\n{self.log}")

    @property
    def log(self) -> str:
        """What the server has logged."""
        return self._log.read_text(encoding="utf-8")

    def size(self) -> Size:
        """Measure the server and its child processes."""
        pids = [self._process.pid, *_children(self._process.pid)]
        facts = [(Path("/proc") / str(pid) / "status").read_text(encoding="utf-8") for pid in pids]
        return Size(
            at=time.monotonic(),
            megabytes=sum(_number("VmRSS", text) for text in facts) * 1024 / _MEGABYTE,
            descriptors=len(list((Path("/proc") / str(self._process.pid) / "fd").iterdir())),
            threads=int(_number("Threads", facts[0])),
            processes=len(pids),
        )

    def stop(self) -> int:
        """Ask the server to end; return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_STOP_SECONDS)


def at_work(metrics: str) -> float:
    """Return what running and waiting requests and used blocks add up to: 0 when nothing is held."""
    rows = re.findall(r"^vllm:(?:num_requests_\w+|kv_cache_usage_perc)\{.*?\} (\S+)$", metrics, re.MULTILINE)
    assert len(rows) == 3, "one model with three gauges"
    return sum(map(float, rows))


def at_rest(url: str) -> float:
    """Wait a while until the server has nothing to do; return what it still holds."""
    with httpx.Client(base_url=url) as client:
        for _ in range(100):
            held = at_work(client.get("/metrics").text)
            if not held:
                break
            time.sleep(0.1)
    time.sleep(1)  # connections are closed, temporary things let go
    return held


def _children(pid: int) -> list[int]:
    lists = (Path("/proc") / str(pid) / "task").glob("*/children")
    return [int(child) for text in lists for child in text.read_text(encoding="utf-8").split()]


def _number(name: str, status: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    return float(found[1]) if found else 0.0
