"""Drafters for tests, which know what comes next, or never do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ovms_lora.core.errors import EngineError
from ovms_lora.engine.draft_model import DraftModel
from ovms_lora.engine.drafts import Draft
from ovms_lora.engine.sequence import Sequence
from tests.fakes import VOCAB_SIZE, FakeRunner


class Oracle:
    """A Drafter that says what `guess` says of a sequence and a number of tokens; it remembers whom it keeps."""

    free = True
    seconds_per_token = 0.0

    def __init__(self, guess: Callable[[Sequence, int], list[int]]) -> None:
        self._guess = guess
        self.kept: set[Sequence] = set()

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        return {sequence: Draft(tuple(self._guess(sequence, count)[:count])) for sequence, count in wanted.items()}

    def keep(self, sequences: Collection[Sequence]) -> None:
        self.kept = set(sequences)


class Broken(Oracle):
    """A Drafter whose device fails."""

    def __init__(self) -> None:
        super().__init__(lambda *_: [])
        self.calls = 0

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        self.calls += 1
        raise EngineError("the device failed in a step")


def draft_model(
    runner: FakeRunner | None = None, *, max_model_len: int = 256, max_tokens: int = 256, prefix_caching: bool = True
) -> DraftModel:
    """Return a draft model on a fake device: without adapters it writes what a FakeRunner writes."""
    return DraftModel(
        runner or FakeRunner(num_blocks=256),
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
        prefix_caching=prefix_caching,
    )
