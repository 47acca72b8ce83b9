"""The flags of the suite. Imports nothing that is measured, so that help and errors are quick."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.parts import PARTS
from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser, did_you_mean

MODEL_NAMES = ("smollm2", "llama-1b")
_PART_NAMES = tuple(part.name for part in PARTS)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What is asked for: parts (all where there is none), models by name, and the seconds of a comparison if given."""

    names: tuple[str, ...]
    models: tuple[str, ...]
    long: bool
    report: bool
    seconds: float | None = None


def build_parser() -> FlagParser:
    """Return the parser of the command line."""
    description = "Measure on this machine. Results are written to bench/results/ of the repository."
    parser = FlagParser(prog="ovms-lora bench", description=description)
    parts, models = ", ".join(_PART_NAMES), ", ".join(MODEL_NAMES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"parts to measure, of {parts}; default all")
    parser.add("models", default="smollm2", metavar="NAMES", help=f"of {models}; default smollm2; made at first use")
    parser.add("long", action="store_true", help="more rounds, sizes and adapters")
    parser.add(
        "seconds",
        type=_seconds,
        metavar="SECONDS",
        help="how long one comparison may take; fewer than 5 rounds are made where it is short (default 6)",
    )
    parser.add("report", action="store_true", help="measure nothing: draw and report what was measured")
    return parser


def parse(words: Sequence[str]) -> Arguments:
    """Return what the command line asks for. Raises UsageError where that is unknown."""
    given = build_parser().parse_all(words)
    models = tuple(given.models.split(","))
    for kind, names, known in (("part", given.names, _PART_NAMES), ("model", models, MODEL_NAMES)):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
                raise UsageError(f"unknown {kind} {name!r}", hint=hint)
    if given.long and given.seconds is not None:
        raise UsageError("--seconds does not go with --long", hint="the long form takes the time that it needs")
    return Arguments(tuple(given.names), models, given.long, given.report, given.seconds)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds
