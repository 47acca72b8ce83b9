"""The flags of the suite. Imports nothing that is measured, so that help and errors are quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.parts import PARTS

MODEL_NAMES = ("smollm2", "llama-1b")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What is asked for: parts (all where there is none) and models by name."""

    names: tuple[str, ...]
    models: tuple[str, ...]
    long: bool
    report: bool


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = "Measure on this machine. Results are written to bench/results/ of the repository."
    parser = argparse.ArgumentParser(prog="ovms-lora bench", description=description)
    known = ", ".join(part.name for part in PARTS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"parts to measure, of {known}; default all")
    models = f"of {', '.join(MODEL_NAMES)}; default smollm2; made at first use"
    parser.add_argument("--models", default="smollm2", metavar="NAMES", help=models)
    parser.add_argument("--long", action="store_true", help="more rounds, sizes and adapters")
    parser.add_argument("--report", action="store_true", help="measure nothing: draw and report what was measured")
    return parser


def parse(argv: Sequence[str] | None) -> Arguments:
    """Return what the command line asks for; ends the process where that is unknown."""
    parser = build_parser()
    given = parser.parse_args(argv)
    models = tuple(given.models.split(","))
    for kind, names, known in (
        ("part", given.names, [part.name for part in PARTS]),
        ("model", models, MODEL_NAMES),
    ):
        for name in names:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; there are {', '.join(known)}")
    return Arguments(tuple(given.names), models, given.long, given.report)
