"""Measures what `ovms-lora plan` has to know of a replica: times of steps, of prompts and of adapters, and sizes.

python -m bench.replica_profile --model smollm2 --out profile.json [--max_rows 8] [--max_adapters 4] [--threads 1]
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench.models import MODELS
from bench.results import machine
from bench.timed_engine import Answered, Asked, TimedEngine, Waiter
from bench.workload import base_linears, write_adapter
from ovms_lora.adapters.adapter import load_adapter
from ovms_lora.engine.lora_states import host_dtype
from ovms_lora.engine.runner import OpenVinoRunner
from ovms_lora.scale.plan.replica_profile import PrefillPoint, ReplicaProfile, StepPoint

_PROMPTS = (16, 64, 128, 256)
_NAMES = itertools.count()
Point = TypeVar("Point", StepPoint, PrefillPoint)


@dataclass(frozen=True, slots=True)
class Extent:
    """How far is measured, and how thoroughly: `tokens` decode steps for each point, everything `rounds` times."""

    max_rows: int = 8
    max_adapters: int = 4
    rank: int = 16
    tokens: int = 16
    rounds: int = 2


class ReplicaMeter:
    """Measures one engine with more adapters than its graph holds, and none too many for host memory."""

    def __init__(self, engine: TimedEngine, answers: Waiter, extent: Extent) -> None:
        self._engine, self._answers, self._extent = engine, answers, extent
        self._aliases = list(engine.adapters)
        self._base = base_linears(engine.model.folder)
        self._rng = np.random.default_rng()  # prompts that no prefix cache has seen

    def measure(self) -> ReplicaProfile:
        """Return the profile; takes some tens of seconds for a small model."""
        self._decode(self._extent.max_rows, self._extent.max_adapters)  # warm up
        taken = resident_memory()
        steps = [
            StepPoint(rows=rows, adapters=adapters, seconds=self._mean(lambda r=rows, a=adapters: self._decode(r, a)))  # type: ignore[misc]
            for rows, adapters in self._places()
        ]
        prefill = [
            PrefillPoint(tokens=tokens, seconds=self._mean(lambda t=tokens: self._first_token(t, 0)))  # type: ignore[misc]
            for tokens in _PROMPTS
        ]
        host = sum(pair.a.nbytes + pair.b.nbytes for pair in self._engine.host_adapter("a0").layers.values())
        return ReplicaProfile(
            model=self._engine.model.folder.name,
            rank=self._extent.rank,
            steps=tuple(steps),
            prefill=tuple(prefill),
            bring_in_seconds=self._bring_in(),
            load_seconds=self._mean(self._load),
            base_bytes=max(0, taken - host * len(self._aliases)),
            kv_bytes_per_token=kv_bytes_per_token(self._engine),
            resident_bytes_per_rank=host // self._extent.rank,
            host_bytes_per_adapter=host,
            machine=machine(),
        )

    def _places(self) -> Iterator[tuple[int, int]]:
        for rows in _doubling(self._extent.max_rows):
            yield rows, 0
            yield from ((rows, adapters) for adapters in _doubling(min(rows, self._extent.max_adapters)))

    def _mean(self, measured: Callable[[], float]) -> float:
        # Not the median: what now and then takes long, because others compute too, makes answers late all the same.
        return statistics.fmean(measured() for _ in range(self._extent.rounds))

    def _decode(self, rows: int, adapters: int) -> float:
        """Return the time of a step: all rows decode between the last row's first token and the first row's last."""
        aliases = [self._aliases[row % adapters] if adapters else None for row in range(rows)]
        answers = self._ask([(8, alias, self._extent.tokens + 1) for alias in aliases])
        last_begun = max(answers, key=lambda answer: answer.first)
        return (last_begun.last - last_begun.first) / self._extent.tokens

    def _first_token(self, tokens: int, adapter: int) -> float:
        (answer,) = self._ask([(tokens, self._aliases[adapter], 1)])
        return answer.last - answer.begin

    def _bring_in(self) -> float:
        """Return how much later a first token comes when its adapter is in host memory only."""
        adapters = self._extent.max_adapters + 1
        times = 2 * adapters
        cold = [self._first_token(16, index % adapters) for index in range(times)]
        warm = [self._first_token(16, 0) for _ in range(times)]
        return max(0.0, statistics.fmean(cold) - statistics.fmean(warm))

    def _load(self) -> float:
        begin = time.perf_counter()
        dtype = host_dtype(self._engine.lora.dtype)
        load_adapter(self._engine.adapters["a0"], self._base, max_lora_rank=self._extent.rank, lora_dtype=dtype)
        return time.perf_counter() - begin

    def _ask(self, asked: list[tuple[int, str | None, int]]) -> list[Answered]:
        for prompt, alias, tokens in asked:
            ids = tuple(self._rng.integers(10, 250, prompt).tolist())
            self._engine.submit(Asked(f"profile-{next(_NAMES)}", ids, alias, tokens))
        return self._answers.all(len(asked))


def mean_profile(profiles: Sequence[ReplicaProfile]) -> ReplicaProfile:
    """Return the mean of profiles with the same points: of a machine at different times."""

    def mean(points: Iterable[tuple[Point, ...]]) -> tuple[Point, ...]:
        columns = zip(*points, strict=True)
        return tuple(
            column[0].model_copy(update={"seconds": statistics.fmean(point.seconds for point in column)})
            for column in columns
        )

    return profiles[0].model_copy(
        update={
            "steps": mean(profile.steps for profile in profiles),
            "prefill": mean(profile.prefill for profile in profiles),
            "bring_in_seconds": statistics.fmean(profile.bring_in_seconds for profile in profiles),
            "load_seconds": statistics.fmean(profile.load_seconds for profile in profiles),
            "overhead_seconds": statistics.fmean(profile.overhead_seconds for profile in profiles),
        }
    )


def kv_bytes_per_token(engine: TimedEngine) -> int:
    """Return the bytes of keys and values of one token, in all layers."""
    runner = engine.model.engine._runner
    assert isinstance(runner, OpenVinoRunner), "a real device"
    return int(sum(blocks.nbytes for blocks in runner._blocks) / runner.num_blocks / runner.block_size)


def resident_memory() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def write_adapters(folder: Path, model: Path, count: int, *, rank: int) -> dict[str, Path]:
    """Write so many random adapters a0, a1, …; return their folders by alias."""
    base = base_linears(model)
    return {f"a{index}": write_adapter(folder / f"a{index}", base, rank=rank, seed=index) for index in range(count)}


def _doubling(most: int) -> Iterator[int]:
    """Yield 1, 2, 4, … and the most."""
    yield from itertools.takewhile(lambda count: count < most, (2**power for power in itertools.count()))
    yield most


def parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(prog="python -m bench.replica_profile", description=__doc__)
    parser.add_argument("--model", required=True, help=f"a model folder, or {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--max_rows", type=int, default=8, help="rows of a batch, up to which is measured")
    parser.add_argument("--max_adapters", type=int, default=4, help="different adapters in one batch (max_loras)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--threads", type=int, help="threads of a replica (default: OpenVINO's choice)")
    return parser


def main() -> None:
    """Measure one model and write its profile."""
    options = parser().parse_args()
    extent = Extent(options.max_rows, options.max_adapters, options.rank)
    model = MODELS[options.model]() if options.model in MODELS else Path(options.model)
    answers = Waiter()
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder), model, extent.max_adapters + 1, rank=extent.rank)
        engine = TimedEngine(model, adapters, answers, threads=options.threads, max_loras=extent.max_adapters)
        profile = ReplicaMeter(engine, answers, extent).measure()
        engine.close()
    options.out.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
