"""Speculation: how far each sequence guesses ahead, so that it never costs more than it brings.

    running ──who continues──► drafter ──drafts──► as far as they are likely enough for their price ──► scheduler

How likely a draft is to prove right is learned per sequence and kind of draft, also from drafts that are only compared
with what came. What a row costs is learned from the steps (`step_cost`). So with many sequences, which keep the device
busy, or with texts that nobody can guess, nothing is guessed, and a step is what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ovms_lora.core.errors import EngineError
from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.drafts import Draft, Drafter, agreeing
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.step_cost import StepCost

log = logging.getLogger(__name__)

_WEIGHT = 0.2  # of one token in the rates of its sequence
_TYPICAL_WEIGHT = 0.05  # and in those that a new sequence begins with
_LONGEST_PAUSE = 64  # steps
_CONFIDENT_TOKENS = 16  # at most, where a request bounds a draft by confidence and not by number
_MOST_TOKENS = 32  # of a draft, whatever is asked for: all who run wait for it to be written


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the start: drafts that were checked, their tokens, and those of them that proved right."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Speculation:
    """Belongs to the engine thread. `most_tokens` tells how many tokens may follow a request's prompt."""

    def __init__(
        self,
        drafter: Drafter,
        options: SpeculationOptions,
        most_tokens: Callable[[GenerationRequest], int],
        cost: StepCost | None = None,
    ) -> None:
        self.stats = SpeculationStats()
        self._drafter: Drafter | None = drafter
        self._options = options
        self._most_tokens = most_tokens
        self._cost = cost or StepCost()
        self._paces: dict[Sequence, _Pace] = {}
        self._typical: dict[int, float] = {}

    def propose(self, running: Seq[Sequence]) -> dict[Sequence, tuple[int, ...]]:
        """Return the tokens to check in the next step, for those of the running sequences where it is worth while."""
        drafter = self._drafter
        if drafter is None:
            return {}
        self._paces = {sequence: pace for sequence in running if (pace := self._paces.get(sequence))}
        drafter.keep(running)
        continuing = [sequence for sequence in running if sequence.num_pending == 1]
        price = self._cost.price(len(continuing), drafter.seconds_per_token)
        wanted = {}
        for sequence in continuing:
            if sequence.num_output == 0 or sequence.request.sampling.beam_width > 1:
                continue
            pace = self._pace_of(sequence)
            pace.learn(sequence.token_ids)
            limit = self._limit(sequence)
            count = limit if drafter.free else pace.worth(0, price, limit) or pace.trial(limit)
            if count > 0:
                wanted[sequence] = count
        return self._worth_while(self._drafts(drafter, wanted), price)

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Take in a step that has run, after its tokens were chosen: how long it took, and what proved right."""
        rows, continues = 0, True
        for chunk in chunks:
            rows += chunk.count
            continues &= chunk.count == 1 + len(chunk.draft)
            if chunk.draft:
                self.stats.drafts += 1
                self.stats.draft_tokens += len(chunk.draft)
                self.stats.accepted_tokens += agreeing(chunk.draft, chunk.sequence.token_ids[chunk.start + 1 :])
        if rows and continues:
            self._cost.observe(rows, seconds)

    def _pace_of(self, sequence: Sequence) -> _Pace:
        pace = self._paces.get(sequence)
        if pace is None:
            pace = self._paces[sequence] = _Pace(self._typical)
        return pace

    def _limit(self, sequence: Sequence) -> int:
        """How many tokens may be guessed: the last one that may follow is chosen in any case."""
        assistance = sequence.request.assistance
        asked = assistance.num_tokens
        if asked is None:
            asked = _CONFIDENT_TOKENS if assistance.confidence else self._options.num_tokens
        return min(asked, _MOST_TOKENS, self._most_tokens(sequence.request) - sequence.num_output - 1)

    def _drafts(self, drafter: Drafter, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, Draft]:
        if not wanted:
            return {}
        try:
            return drafter.draft(wanted)
        except EngineError as error:
            # Answers do not need it, so nobody is failed for it.
            log.exception("guessing ahead has failed and ends: %s", error.message)
            drafter.keep(())
            self._drafter = None
            return {}

    def _worth_while(self, drafts: Mapping[Sequence, Draft], price: float) -> dict[Sequence, tuple[int, ...]]:
        proposed = {}
        for sequence, draft in drafts.items():
            pace = self._paces[sequence]
            pace.expect(sequence.num_tokens, draft)
            count = len(draft.token_ids)
            if self._drafter and self._drafter.free:
                count = pace.worth(draft.kind, price, count)
            if count > 0:
                proposed[sequence] = draft.token_ids[:count]
        return proposed


class _Pace:
    """How often the drafts of one sequence have proved right lately, by kind. `typical` is shared by all sequences."""

    def __init__(self, typical: dict[int, float]) -> None:
        self._typical = typical
        self._rates: dict[int, float] = {}
        self._expected: tuple[int, Draft] | None = None
        self._pause = 1
        self._waited = 0

    def expect(self, place: int, draft: Draft) -> None:
        """Note a draft of what stands from `place` on, checked or not."""
        self._expected = place, draft

    def learn(self, token_ids: Seq[int]) -> None:
        """Compare what was expected with what has come."""
        if self._expected is None:
            return
        place, draft = self._expected
        self._expected = None
        come = token_ids[place:]
        right = agreeing(draft.token_ids, come)
        outcomes = [1.0] * right + [0.0] * (right < min(len(come), len(draft.token_ids)))
        for outcome in outcomes:
            self._rates[draft.kind] = _towards(self._rate(draft.kind), outcome, _WEIGHT)
            typical = self._typical.get(draft.kind, _first_rate(draft.kind))
            self._typical[draft.kind] = _towards(typical, outcome, _TYPICAL_WEIGHT)
        if right:
            self._pause = 1

    def worth(self, kind: int, price: float, limit: int) -> int:
        """Return how many tokens of a draft are worth their price: one is right only when all before it are."""
        rate = likely = self._rate(kind)
        count = 0
        while count < limit and likely >= price:
            count, likely = count + 1, likely * rate
        return count

    def trial(self, limit: int) -> int:
        """Return 1 now and then, where nothing seems worth its price: the text may have become easier to guess."""
        self._waited += 1
        if self._waited < self._pause:
            return 0
        self._waited, self._pause = 0, min(2 * self._pause, _LONGEST_PAUSE)
        return min(limit, 1)

    def _rate(self, kind: int) -> float:
        return self._rates.get(kind, self._typical.get(kind, _first_rate(kind)))


def _first_rate(kind: int) -> float:
    """Return how often a token of a draft is taken to be right before anything is known."""
    return kind / (kind + 1.5) if kind else 0.6


def _towards(rate: float, outcome: float, weight: float) -> float:
    return rate + weight * (outcome - rate)
