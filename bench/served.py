"""`ovms-lora serve` as a process, for measurements over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.models import ROOT

_STOP_SECONDS = 60


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Serve in a process of its own; yield the address when it is ready."""
    command = [sys.executable, "-m", "ovms_lora.cli", "serve", "--rest_port", "0", "--log_level", "INFO", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield _address(process)
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


def write_config(folder: Path, model: Path, adapters: Mapping[str, Path], **lora_options: Any) -> Path:
    """Write a config.json that names a model `base` and its adapters; return it."""
    listed = [{"alias": alias, "path": str(path)} for alias, path in adapters.items()]
    entry: dict[str, Any] = {"name": "base", "base_path": str(model), "lora_adapters": listed}
    config = {"model_config_list": [{"config": {**entry, "lora_options": lora_options}}]}
    path = folder / f"config-{len(adapters)}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr, "piped"
    said: list[str] = []
    for line in process.stderr:
        if line.startswith("ready: "):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it never waits for a reader
            return line.split()[1]
        said.append(line)
    raise SystemExit(f"error: the server did not start: {''.join(said[-10:])}")
