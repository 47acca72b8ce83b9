"""DraftModel: a smaller model with the same tokens, which writes ahead of the model that is served.

    tokens of the sequence    [ p0 p1 p2 p3 g0 ]
    those of its shadow       [ p0 p1 p2 p3 g0 │ d0 d1 d2 ]      d0 … d2 are the draft
    computed by the draft       ────────────────────────         all but the last token

Every sequence that guesses has a shadow in the draft model, with blocks in a cache of its own. What of a draft proves
right is computed already when the next one is wanted. Knows no adapters: the base guesses, the adapted model decides.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np

from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.block_tables import BlockTables
from ovms_lora.engine.drafts import Draft, agreeing
from ovms_lora.engine.runner import FloatArray, ModelRunner
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence

_WEIGHT = 0.2
_FEW = 4  # tokens: a chunk of no more costs about what one of a single token does


@dataclass(slots=True, eq=False)
class _Shadow:
    """A sequence's tokens in the draft model, with blocks for them, and behind them the draft."""

    tokens: Sequence
    confidence: float
    draft: list[int] = field(default_factory=list)
    wanted: int = 0

    def next_chunk(self) -> Chunk:
        """Return the last token of the draft, to be computed."""
        last = self.tokens.num_tokens + len(self.draft) - 1
        return Chunk(self.tokens, last, 1, 1, (self.draft[-1],))


class DraftModel:
    """A Drafter over a runner of its own, in whose steps at most `max_tokens` are computed.

    A draft holds only tokens below `vocab_size`, which is the served model's, and none past `max_model_len`.
    """

    free = False

    def __init__(
        self, runner: ModelRunner, *, vocab_size: int, max_model_len: int, max_tokens: int, prefix_caching: bool
    ) -> None:
        self.seconds_per_token = 0.0
        self._runner = runner
        self._vocab_size = min(vocab_size, runner.vocab_size)
        self._max_model_len = max_model_len
        self._max_tokens = max_tokens
        pool = BlockPool(runner.num_blocks, runner.block_size)
        self._tables = BlockTables(pool, prefix_caching=prefix_caching)
        self._shadows: dict[Sequence, _Shadow] = {}

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        """Write ahead in all these sequences at once; see Drafter.

        What the draft model has not read yet, it reads first: a long prompt in several calls.
        """
        shadows = {sequence: shadow for sequence in wanted if (shadow := self._up_to_date(sequence))}
        for sequence, shadow in shadows.items():
            shadow.wanted = min(wanted[sequence], self._max_model_len - sequence.num_tokens)
        going_on = self._read(list(shadows.values()))
        while going_on:
            going_on = self._write(going_on)
        return {sequence: Draft(tuple(shadow.draft)) for sequence, shadow in shadows.items() if shadow.draft}

    def keep(self, sequences: Collection[Sequence]) -> None:
        """Forget all other sequences, and free their blocks."""
        for sequence in self._shadows.keys() - set(sequences):
            self._tables.close(self._shadows.pop(sequence).tokens)

    def _up_to_date(self, sequence: Sequence) -> _Shadow | None:
        """Return the sequence's shadow with all its tokens, and with blocks for them; None when there is no room."""
        shadow = self._shadows.get(sequence)
        if shadow is None:
            return self._open(sequence)
        tokens = shadow.tokens
        come = sequence.token_ids[tokens.num_tokens :]
        if shadow.draft and not come:
            return shadow  # the model had no room for it: the draft stands
        right = agreeing(shadow.draft[:-1], come)
        tokens.token_ids += come
        self._tables.computed(tokens, tokens.num_computed + right)
        self._tables.trim(tokens)
        shadow.draft.clear()
        if self._tables.missing(tokens) > self._tables.pool.num_free:
            self._tables.close(self._shadows.pop(sequence).tokens)
            return None
        self._tables.grow(tokens)
        return shadow

    def _open(self, sequence: Sequence) -> _Shadow | None:
        # Without adapters: their keys and values are not the draft model's.
        request = replace(sequence.request, adapters=(), constraint=None)
        tokens = Sequence(request, sequence.index)
        tokens.token_ids = list(sequence.token_ids)
        if not self._tables.open(tokens, reserve=0):
            return None
        shadow = self._shadows[sequence] = _Shadow(tokens, request.assistance.confidence)
        return shadow

    def _read(self, shadows: Seq[_Shadow]) -> list[_Shadow]:
        """Compute what is pending, as far as a step has room; return those that want more than the first token."""
        chunks, reached, budget = [], [], self._max_tokens
        for shadow in shadows:
            tokens = shadow.tokens
            count = min(tokens.num_pending, budget)
            if count and shadow.wanted > 0:
                budget -= count
                ends = count == tokens.num_pending
                chunks.append(Chunk(tokens, tokens.num_computed, count, int(ends)))
                reached += [shadow] * ends
        logits = self._run(chunks)
        for chunk in chunks:
            self._tables.computed(chunk.sequence, chunk.start + chunk.count)
        return self._choose(reached, logits)

    def _write(self, shadows: Seq[_Shadow]) -> list[_Shadow]:
        """Compute the last tokens of drafts; return those that want one more."""
        room = [s for s in shadows if self._tables.extend(s.tokens, len(s.draft)) == len(s.draft)]
        return self._choose(room, self._run([shadow.next_chunk() for shadow in room]))

    def _choose(self, shadows: Seq[_Shadow], logits: FloatArray) -> list[_Shadow]:
        """Add the best token of each row to the draft that it belongs to; return those that are not done."""
        logits = logits[:, : self._vocab_size]
        going_on = []
        for shadow, row, best in zip(shadows, logits, logits.argmax(axis=1).tolist(), strict=True):
            if shadow.confidence and 1.0 / float(np.exp(row - row[best]).sum()) < shadow.confidence:
                continue
            shadow.draft.append(best)
            if len(shadow.draft) < shadow.wanted:
                going_on.append(shadow)
        return going_on

    def _run(self, chunks: list[Chunk]) -> FloatArray:
        if not chunks:
            return np.empty((0, self._runner.vocab_size), np.float32)
        begun = time.perf_counter()
        logits = self._runner.run(chunks)
        if all(chunk.count <= _FEW for chunk in chunks):
            seconds = (time.perf_counter() - begun) / len(chunks)
            self.seconds_per_token += (_WEIGHT if self.seconds_per_token else 1.0) * (seconds - self.seconds_per_token)
        return logits
