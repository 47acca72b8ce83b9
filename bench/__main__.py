"""The suite: `ovms-lora bench` and `make bench`. Measures, writes bench/results/, draws, and reports."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.models import MODELS
from bench.part import Part, Plan
from bench.parts import NAMES, PARTS
from bench.plots import draw
from bench.report import report
from bench.results import read_parts, write_part


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="ovms-lora bench", description="Measure on this machine.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"parts to measure, of {', '.join(NAMES)}; default all"
    )
    parser.add_argument("--models", default="smollm2", metavar="NAMES", help=f"of {', '.join(MODELS)}; default smollm2")
    parser.add_argument("--long", action="store_true", help="more rounds, sizes and adapters: an hour for each model")
    parser.add_argument("--report", action="store_true", help="measure nothing: draw and report what was measured")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for; return the exit code."""
    parser = build_parser()
    given = parser.parse_args(argv)
    models = given.models.split(",")
    for kind, names, known in (("part", given.names, NAMES), ("model", models, MODELS)):
        for name in names:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; there are {', '.join(known)}")
    if not given.report:
        for model in models:
            for part in PARTS:
                if not given.names or part.name in given.names:
                    _measure(part, model, long=given.long)
    results = read_parts()
    for path in draw(results):
        print(path, file=sys.stderr)
    print(report(results))
    return 0


def _measure(part: Part, model: str, *, long: bool) -> None:
    begin = time.monotonic()
    print(f"{model}, {part.name}: {part.says}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rows = part.measure(MODELS[model](), Plan.of(Path(folder), long=long))
    path = write_part(part.name, model, rows, long=long)
    print(f"{path} ({time.monotonic() - begin:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
