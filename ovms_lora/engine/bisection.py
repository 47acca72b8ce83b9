"""Bisection: when a step fails, which of its sequences are to blame; the others get their logits all the same.

    [a b c d] ✗ ──► [a b] ✓  [c d] ✗ ──► [c] ✓  [d] ✗       d fails; a, b and c go on

Runs a part again as often as is needed: keys and values are written to the same places with the same content. Knows
nothing of what becomes of the requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from ovms_lora.core.errors import EngineError
from ovms_lora.engine.runner import FloatArray, ModelRunner
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence

# One culprit among n costs log2 n splits. A device that fails with everyone must not be asked 2 n times.
_SPLITS_PER_LEVEL = 4


@dataclass(frozen=True, slots=True)
class StepResult:
    """The chunks that were computed, in their order, with their rows of logits; and which requests failed, and why."""

    chunks: Seq[Chunk]
    logits: FloatArray
    failures: Mapping[str, EngineError]


def run_step(runner: ModelRunner, chunks: Seq[Chunk]) -> StepResult:
    """Compute a step. When it fails, compute its halves, and theirs, until only those are left that fail alone.

    A request that fails takes all its sequences with it. The logits are valid until the next call of the runner.
    """
    try:
        return StepResult(chunks, runner.run(chunks), {})
    except EngineError as error:
        return _Bisection(runner, chunks, error).result()


class _Bisection:
    """One step that has failed with `error` as a whole."""

    def __init__(self, runner: ModelRunner, chunks: Seq[Chunk], error: EngineError) -> None:
        self._runner = runner
        self._chunks = chunks
        self._rows: dict[Sequence, FloatArray] = {}
        self._failures: dict[str, EngineError] = {}
        self._parts: deque[list[Chunk]] = deque()
        self._splits = _SPLITS_PER_LEVEL * len(chunks).bit_length()
        self._failed(sorted(chunks, key=_adapters), error)

    def result(self) -> StepResult:
        # Level by level: when no split is left, whoever is innocent has mostly been told from the others.
        while self._parts:
            part = self._parts.popleft()
            try:
                self._computed(part, self._runner.run(part))
            except EngineError as error:
                self._failed(part, error)
        chunks = [chunk for chunk in self._chunks if chunk.sequence.request.request_id not in self._failures]
        rows = [self._rows[chunk.sequence] for chunk in chunks]
        logits = np.concatenate(rows) if rows else np.empty((0, self._runner.vocab_size), np.float32)
        return StepResult(chunks, logits, self._failures)

    def _computed(self, part: list[Chunk], logits: FloatArray) -> None:
        kept, end = logits.copy(), 0
        for chunk in part:
            begin, end = end, end + chunk.num_sampled
            self._rows[chunk.sequence] = kept[begin:end]

    def _failed(self, part: list[Chunk], error: EngineError) -> None:
        if len(part) > 1 and self._splits > 0:
            self._splits -= 1
            middle = _middle(part)
            self._parts += part[:middle], part[middle:]
            return
        for chunk in part:
            self._failures.setdefault(chunk.sequence.request.request_id, error)


def _adapters(chunk: Chunk) -> tuple[str, ...]:
    return tuple(use.digest for use in chunk.sequence.request.adapters)


def _middle(part: list[Chunk]) -> int:
    """Where to cut: between the users of different adapters where there are some, for one adapter may be to blame."""
    half = len(part) // 2
    borders = [i for i in range(1, len(part)) if _adapters(part[i - 1]) != _adapters(part[i])]
    return min(borders, key=lambda border: abs(border - half), default=half)
