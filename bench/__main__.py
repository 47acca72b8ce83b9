"""The suite: `ovms-lora bench` and `make bench`. Measures, writes bench/results/, draws, and reports."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.arguments import Arguments, parse
from bench.part import Part, Plan
from bench.parts import PARTS
from bench.report import report
from bench.results import read_parts, write_part
from ovms_lora.cli import exit_code
from ovms_lora.core.errors import UsageError


def run(words: Sequence[str]) -> int:
    """Measure what is asked for; return the exit code. Raises UsageError."""
    given = parse(words)
    if find_spec("matplotlib") is None:
        raise UsageError("what the benchmarks need is not installed", hint="make bench installs it, and measures")
    from bench.plots import draw

    for model in () if given.report else given.models:
        for part in PARTS:
            if not given.names or part.name in given.names:
                _measure(part, model, given)
    results = read_parts()
    for path in draw(results):
        print(path, file=sys.stderr)
    print(report(results))
    return 0


def _measure(part: Part, model: str, given: Arguments) -> None:
    from bench.models import MODELS

    begin = time.monotonic()
    print(f"{model}, {part.name}: {part.says}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rows = part.measure(MODELS[model](), Plan.of(Path(folder), long=given.long, seconds=given.seconds))
    path = write_part(part.name, model, rows, long=given.long)
    print(f"{path} ({time.monotonic() - begin:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
