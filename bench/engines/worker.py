"""The process of one engine: makes it of a Setup, then does one job after another. JSON lines on stdin and stdout."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bench.engines.job import Job, Setup, Start

# Where each engine's class is; only the one that runs is imported.
_ENGINES = {
    "ovms-lora": ("bench.engines.own", "Own"),
    "genai": ("bench.engines.genai", "GenAI"),
    "vllm": ("bench.engines.vllm", "Vllm"),
    "llama.cpp": ("bench.engines.llama_cpp", "LlamaCpp"),
    "peft": ("bench.engines.peft_torch", "PeftTorch"),
}
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def main() -> None:
    """Serve jobs until stdin ends."""
    _end_with_parent()
    answers = _private_stdout()
    order = json.loads(sys.stdin.readline())
    engine = _start(order["engine"])(_setup(order["setup"]))
    _tell(answers, {"ready": True})
    for line in sys.stdin:
        _tell(answers, asdict(engine.run(Job(**json.loads(line)))))


def _start(name: str) -> Start:
    module, attribute = _ENGINES[name]
    start: Start = getattr(importlib.import_module(module), attribute)
    return start


def _setup(values: dict[str, Any]) -> Setup:
    adapters = {name: Path(path) for name, path in values["adapters"].items()}
    source, vocabulary = (Path(values[name]) if values[name] else None for name in ("source", "vocabulary"))
    return Setup(Path(values["model"]), adapters, Path(values["work"]), values["max_batch"], source, vocabulary)


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, in whatever way: it may stand still then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _private_stdout() -> TextIO:
    """Return stdout for answers alone: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _tell(answers: TextIO, message: object) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
