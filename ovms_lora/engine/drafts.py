"""Drafts: guesses of the tokens that come next in a sequence, and who makes them.

A draft is never trusted: the model computes all of it in one step, and what it would not have chosen itself is
dropped. Knows no prices; how much of a draft is worth a step's time is `speculation`'s business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from ovms_lora.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next. Drafts of one `kind` prove right about equally often, those of a higher one oftener.

    A drafter that does not know how sure it is has only the kind 0.
    """

    token_ids: tuple[int, ...]
    kind: int = 0


class Drafter(Protocol):
    """Guesses for many sequences at once, and may keep something for each of them.

    `free` says that a guess costs next to nothing, so that it may also be made just to see whether it proves right.
    `seconds_per_token` is what a token of a draft costs beside its row in the model's step.
    """

    free: bool
    seconds_per_token: float

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, Draft]:
        """Return drafts for these sequences, of at most so many tokens; none where nothing can be guessed.

        Raises EngineError when a device fails.
        """

    def keep(self, sequences: Collection[Sequence]) -> None:
        """Forget all other sequences, and give back what was held for them."""


def agreeing(draft: Seq[int], token_ids: Seq[int]) -> int:
    """Return how many tokens, from the first on, are the same."""
    count = 0
    for guessed, come in zip(draft, token_ids, strict=False):
        if guessed != come:
            break
        count += 1
    return count
