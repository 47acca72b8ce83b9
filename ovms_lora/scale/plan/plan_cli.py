"""`ovms-lora plan`: its flags, and what they mean."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser
from ovms_lora.scale.plan import report
from ovms_lora.scale.plan.capacity import Scenario, plan
from ovms_lora.scale.plan.memory import fitted
from ovms_lora.scale.plan.outcome import Goal
from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.replica import ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile, read_profile
from ovms_lora.scale.plan.token_lengths import TokenLengths
from ovms_lora.scale.plan.workload import Workload


def run(words: Sequence[str]) -> int:
    """Plan, print, return the exit code. Raises UsageError and PlanError."""
    arguments = plan_parser().parse_all(words)
    scenario = scenario_of(arguments)
    goals = [Goal.parse(text) for text in arguments.goal]
    if (arguments.replicas is None) == (not goals):
        raise UsageError(
            "give either --goal or --replicas", hint="--goal ttft_p95=0.5 finds how many replicas meet that"
        )
    found = plan(scenario, goals, replicas=arguments.replicas, max_replicas=arguments.max_replicas)
    if arguments.json:
        print(report.as_json(found, scenario, goals))
        return 0
    for line in report.as_table(found, scenario, max_replicas=arguments.max_replicas):
        print(line)
    return 0


def plan_parser() -> FlagParser:
    """Return the parser of all flags."""
    parser = FlagParser(
        prog="ovms-lora plan", description="Predict how many replicas a load needs, by simulation (docs/planning.md)."
    )
    add = parser.add
    add("profile", type=Path, required=True, metavar="FILE", help="what a replica costs, as measured")
    add("arrival_rate", type=_positive, metavar="RATE", help="requests per second (default: the sum of --rates)")
    add("adapters", type=_count, metavar="N", help="number of adapters, popular by Zipf's law")
    add("zipf", type=_exponent, default=1.0, metavar="S", help="exponent of that law (default 1; 0: all the same)")
    add("rates", type=Path, metavar="FILE", help="or JSON of requests per second by adapter")
    add("base_share", type=_share, default=0.0, metavar="SHARE", help="requests without an adapter, of 1 (default 0)")
    add(
        "prompt_tokens",
        default="128",
        metavar="LENGTHS",
        help="128, 64-256, exp:128 or a file of lengths (default 128)",
    )
    add("output_tokens", default="exp:128", metavar="LENGTHS", help="the same for answers (default exp:128)")
    add("goal", action="append", default=[], metavar="GOAL", help="ttft_p95=0.5, e2e_p99=10 … in seconds (repeatable)")
    add("replicas", type=_count, metavar="N", help="or simulate so many replicas")
    add("max_replicas", type=_count, default=1000, metavar="N", help="look no further (default 1000)")
    _add_limits(parser)
    add("requests", type=_count, metavar="N", help="simulated requests (default 20000, or 200 for each replica)")
    add("seed", type=_seed, default=0, metavar="N", help="other random numbers (default 0)")
    add("json", action="store_true", help="print JSON")
    return parser


def _add_limits(parser: FlagParser) -> None:
    add = parser.add
    add("max_loras", type=_count, default=8, metavar="N", help="adapters in a replica's graph at once (default 8)")
    add(
        "max_cpu_loras",
        type=_count,
        metavar="N",
        help="adapters in its host memory (default 64, or what --memory holds)",
    )
    add("rank", type=_count, metavar="N", help="rank of the adapters (default: the profile's)")
    add("total_rank", type=_count, metavar="N", help="ranks in the graph together (default: max_loras of the largest)")
    add("memory", type=_positive, metavar="GB", help="memory of a replica; what does not fit is an error")
    add("max_num_seqs", type=_count, metavar="N", help="rows of a batch (default: as many as were measured)")
    add(
        "max_ongoing_requests",
        type=_count,
        metavar="N",
        help="requests that the router sends to a replica at once (default: max_num_seqs)",
    )


def scenario_of(arguments: argparse.Namespace) -> Scenario:
    """Return what the flags describe. Raises UsageError and PlanError."""
    profile = read_profile(arguments.profile)
    workload = _workload(arguments, profile)
    limits = fitted(
        profile,
        _limits(arguments, profile, workload),
        workload,
        arguments.memory * 1e9 if arguments.memory else None,
    )
    said = _say if sys.stderr.isatty() else lambda _: None
    return Scenario(profile, limits, workload, arguments.requests, arguments.seed, said)


def _workload(arguments: argparse.Namespace, profile: ReplicaProfile) -> Workload:
    rank = arguments.rank or profile.rank
    if (arguments.adapters is None) == (arguments.rates is None):
        raise UsageError("give either --adapters or --rates", hint="--adapters 200 --zipf 1.0")
    if arguments.rates:
        popularity = Popularity.counted(arguments.rates, rank=rank)
    else:
        popularity = Popularity.zipf(arguments.adapters, arguments.zipf, rank=rank)
    rate = arguments.arrival_rate or popularity.rate
    if rate is None:
        raise UsageError("--arrival_rate is missing", hint="--arrival_rate 5 is five requests per second")
    return Workload(
        rate,
        popularity,
        TokenLengths.parse("--prompt_tokens", arguments.prompt_tokens),
        TokenLengths.parse("--output_tokens", arguments.output_tokens),
        arguments.base_share,
    )


def _limits(arguments: argparse.Namespace, profile: ReplicaProfile, workload: Workload) -> ReplicaLimits:
    largest = int(workload.popularity.ranks.max())
    total_rank = arguments.total_rank or arguments.max_loras * largest
    if total_rank < largest:
        raise UsageError(
            f"--total_rank {total_rank} has no room for an adapter of rank {largest}", hint=f"--total_rank {largest}"
        )
    rows = arguments.max_num_seqs or profile.max_rows
    return ReplicaLimits(
        arguments.max_loras, arguments.max_cpu_loras or 0, total_rank, rows, arguments.max_ongoing_requests or rows
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def _positive(text: str) -> float:
    if not _number(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return float(text)


def _share(text: str) -> float:
    if _number(text) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return float(text)


def _exponent(text: str) -> float:
    if _number(text) > 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not an exponent from 0 to 10")
    return float(text)
