"""The report: what was measured against what is aimed at, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.part import Row
from bench.results import Result

SMOLLM2, LLAMA_1B = "smollm2", "llama-1b"
_OWN, _GENAI, _LLAMA_CPP, _VLLM = "ovms-lora", "genai", "llama.cpp", "vllm"
# Others' rates with 8 adapters are measured with as many adapters and tokens as ours; vLLM mixes them, too.
_MIXED = "8 adapters"
_CLOSE = 0.9  # of what the machine allows: then a target that it does not allow counts as met

_BOUND_TITLES = (
    *("decode step", "reads", "at", "takes", "computes", "at", "takes"),
    *("measured", "of the bound", "within 10 %", "linears alone", "of that"),
)


@dataclass(frozen=True, slots=True)
class Number:
    """What was measured, and in how many rounds where it was compared in rounds."""

    value: float
    rounds: int | None


class Results:
    """What was measured, asked for by part and model."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._by_name = {(result.part, result.model): result for result in results}

    def number(self, part: str, model: str, column: str, **wanted: str | float) -> Number | None:
        """Return a number of the one row with these values, None where it was not measured."""
        result = self._by_name.get((part, model))
        rows: Sequence[Row] = result.where(**wanted) if result else ()
        if not rows:
            return None
        assert len(rows) == 1, f"{part}: {len(rows)} rows with {wanted}"
        rounds = rows[0].get("rounds")
        return Number(float(rows[0][column]), None if rounds is None else int(rounds))

    def against(self, other: str, case: str, batch: int) -> Number | None:
        """Return our rate as a multiple of another engine's: ratios are taken within rounds."""
        theirs = self.number("side_by_side", SMOLLM2, "of_first", case=case, batch=batch, engine=other)
        return replace(theirs, value=1 / theirs.value) if theirs else None

    def of_plain(self, case: str, batch: int, model: str) -> Number | None:
        """Return a case's rate as a share of the plain one's."""
        return self.number("batches", model, "of_first", case=case, batch=batch)


@dataclass(frozen=True, slots=True)
class Target:
    """A line of the table: what is aimed at, and how it is found. `most` says that less is better."""

    work: str
    aim: float
    find: Callable[[Results], Number | None]
    most: bool = False
    unit: str = ""

    def line(self, results: Results) -> str:
        """Return the line of the table."""
        found = self.find(results)
        aim = f"{'≤' if self.most else '≥'} {self.aim:g}{self.unit}"
        if found is None:
            return f"| {self.work} | {aim} | not measured | | |"
        met = found.value <= self.aim if self.most else found.value >= self.aim
        return (
            f"| {self.work} | {aim} | {found.value:.3g}{self.unit} | {found.rounds or ''} | {'yes' if met else 'no'} |"
        )


def _against(other: str, case: str, batch: int, aim: float) -> Target:
    work = f"{case}, batch {batch}, against {other}"
    return Target(work, aim, lambda results: results.against(other, case, batch), unit=" times")


def _of_plain(case: str, batch: int, model: str, aim: float) -> Target:
    return Target(f"{case} / plain, {model}, batch {batch}", aim, lambda found: found.of_plain(case, batch, model))


def _prefill(results: Results) -> Number | None:
    return results.number("prefill", LLAMA_1B, "of_first", case="one adapter")


def _python(results: Results) -> Number | None:
    share = results.number("step_time", SMOLLM2, "python_share", case="plain", batch=16)
    return replace(share, value=share.value * 100) if share else None


def _zipf(results: Results) -> Number | None:
    return results.number("scaling", SMOLLM2, "of_first", axis="registered", value=512)


def _start(case: str) -> Callable[[Results], Number | None]:
    return lambda results: results.number("startup", SMOLLM2, "seconds", case=case)


TARGETS = (
    _against(_GENAI, "plain", 8, 1.3),
    _against(_GENAI, "plain", 16, 1.3),
    _against(_GENAI, "plain", 1, 1.05),
    _against(_LLAMA_CPP, "plain", 1, 0.95),
    _against(_GENAI, _MIXED, 8, 8.0),
    _against(_GENAI, _MIXED, 16, 5.5),
    _against(_LLAMA_CPP, _MIXED, 8, 3.5),
    _against(_LLAMA_CPP, _MIXED, 16, 4.5),
    _against(_VLLM, _MIXED, 8, 3.5),
    _against(_VLLM, _MIXED, 16, 4.5),
    _of_plain("8 mixed", 16, SMOLLM2, 0.65),
    _of_plain("8 mixed", 16, LLAMA_1B, 0.88),
    _of_plain("base rows", 16, SMOLLM2, 0.85),
    _of_plain("base rows", 16, LLAMA_1B, 0.98),
    _of_plain("one adapter", 8, LLAMA_1B, 0.90),
    Target("prefill of 480 tokens with one adapter / without, llama-1b", 0.92, _prefill),
    Target("Python outside of the device, smollm2, batch 16", 6.0, _python, most=True, unit=" %"),
    Target("512 registered, 8 resident, Zipf / 8 registered", 0.9, _zipf),
    Target("second start to ready, smollm2", 3.0, _start("second start"), most=True, unit=" s"),
    Target("import ovms_lora.server", 1.0, _start("import ovms_lora.server"), most=True, unit=" s"),
    Target("import ovms_lora.server.app", 1.0, _start("import ovms_lora.server.app"), most=True, unit=" s"),
)


def report(results: Sequence[Result]) -> str:
    """Return the table, then how close decode steps are to what memory and processor allow; within 10 % is met.

    Beside it stands how long the model's linears take alone, which is what OpenVINO's kernels allow. A median of fewer
    than five rounds is an indication.
    """
    found = Results(results)
    titles = ["| work | target | measured | rounds | met |", "|---|---|---|---|---|"]
    lines = [*titles, *(target.line(found) for target in TARGETS)]
    roofline = [(result.model, row) for result in results if result.part == "roofline" for row in result.rows]
    bounds = [_bound(model, row) for model, row in roofline if "linears_ms" in row]  # older results have none
    if bounds:
        lines += ["", f"| {' | '.join(_BOUND_TITLES)} |", "|---" * len(_BOUND_TITLES) + "|", *bounds]
    return "\n".join(lines)


def _bound(model: str, row: Row) -> str:
    share = float(row["of_bound"])
    return (
        f"| {model}, {row['case']}, batch {row['batch']} | {row['step_megabytes']:.0f} MB | "
        f"{row['gigabytes_per_second']:.1f} GB/s | {row['reading_ms']:.1f} ms | {row['step_gigaflop']:.2f} GFLOP | "
        f"{row['gigaflop_per_second']:.0f} GFLOP/s | {row['computing_ms']:.1f} ms | {row['step_ms']:.1f} ms | "
        f"{share:.2f} | {'yes' if share >= _CLOSE else 'no'} | {row['linears_ms']:.1f} ms | {row['of_linears']:.2f} |"
    )
