"""Scheduler: which sequences take part in the next step, and with how many of their tokens.

    waiting  ──admit (in turn, all blocks of its known tokens)───────►  running
    running  ──preempt (youngest first, when no block is left)──────►  front of waiting
    parents  ──replace (beam search: each may have several children)─►  running, or waiting where there is no room

A step holds at most `max_num_batched_tokens` tokens: first one for each sequence that decodes, then prefill chunks of
running sequences, then of newly admitted ones, then drafts, where tokens and blocks are left. Which blocks a sequence
has is `block_tables`' business; tensors and texts are not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ovms_lora.core.errors import EngineError
from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.block_tables import BlockCopy, BlockTables
from ovms_lora.engine.sequence import Fork, Sequence, SequenceStatus
from ovms_lora.engine.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens `start` … `start + count - 1` of a sequence, to be computed in one step.

    The last `num_sampled` of them need logits: none within a prompt, one where a token is sampled, all for prompt
    log-probabilities and for the tokens of a `draft`, which are taken to stand after the sequence's own.
    """

    sequence: Sequence
    start: int
    count: int
    num_sampled: int
    draft: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be chosen."""
        return self.start + self.count - len(self.draft) == self.sequence.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute, as long as none is chosen yet."""
        return [*self.sequence.token_ids[self.start : self.start + self.count - len(self.draft)], *self.draft]

    def drafting(self, draft: tuple[int, ...]) -> Chunk:
        """Return the chunk with a draft behind its last token."""
        count = len(draft)
        return replace(self, count=self.count + count, num_sampled=self.num_sampled + count, draft=draft)


class Residency(Protocol):
    """What the scheduler asks of the adapters' side before it admits a sequence."""

    def acquire(self, sequence: Sequence) -> bool:
        """Hold the sequence's adapters in the graph until `release`; False when there is no room now.

        Raises EngineError when the device cannot take them.
        """

    def release(self, sequence: Sequence) -> None:
        """Let go of the adapters that `acquire` held for this sequence."""


class NoAdapters:
    """The residency of a model without runtime adapters."""

    def acquire(self, sequence: Sequence) -> bool:
        """Say yes: nothing is needed."""
        assert not sequence.request.adapters, "a model without adapters was asked for one"
        return True

    def release(self, sequence: Sequence) -> None:
        """Nothing was held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The bounds of one step and of passing by: see EngineOptions.

    A sequence whose adapters have no room is passed by at most `max_bypasses` times; then nothing younger is admitted
    before it.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 256
    split_prefill: bool = True
    prefix_caching: bool = True
    max_bypasses: int = 64


class Scheduler:
    """Continuous batching over one block pool."""

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        residency: Residency | None = None,
        *,
        copies_blocks: bool = True,
    ) -> None:
        self.blocks = BlockTables(pool, prefix_caching=limits.prefix_caching, copies_blocks=copies_blocks)
        self.limits = limits
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.refused: dict[str, EngineError] = {}  # requests whose adapters the device cannot take, until next planned
        self._residency = residency or NoAdapters()

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.waiting.backlog.sequences or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue. It must fit into the pool when it is alone."""
        pool = self.blocks.pool
        assert pool.blocks_for(sequence.num_tokens) <= pool.num_blocks, "the engine refuses such prompts"
        self.waiting.add(sequence)

    def schedule(self, drafts: Mapping[Sequence, tuple[int, ...]] | None = None) -> list[Chunk]:
        """Plan one step, with the copies of blocks that come before it; empty only when nothing can run.

        `drafts` may be computed with the sequences that decode; nobody gets less for them.
        """
        chunks: list[Chunk] = []
        self.blocks.copies.clear()
        self.refused.clear()
        budget = self._continue_running(chunks, self.limits.max_num_batched_tokens)
        self._admit(chunks, budget)
        while not chunks and (parked := [sequence for sequence in self.running if sequence.parked]):
            # What they hold is all that those need for whom they wait.
            self._preempt(_youngest(parked), chunks)
            self._admit(chunks, self.limits.max_num_batched_tokens)
        if drafts:
            self._add_drafts(chunks, drafts)
        return chunks

    @property
    def copies(self) -> list[BlockCopy]:
        """The copies of blocks to make, in this order, before the planned step runs."""
        return self.blocks.copies

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """Note that the chunks' keys and values now stand in the cache; those of drafts do not count yet."""
        for chunk in chunks:
            if chunk.sequence.status is SequenceStatus.RUNNING:
                self.blocks.computed(chunk.sequence, chunk.start + chunk.count - len(chunk.draft))

    def accepted(self, chunks: Iterable[Chunk]) -> None:
        """Note that the next tokens are chosen: what of a draft is among them is computed, room for more is free."""
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.draft and sequence.status is SequenceStatus.RUNNING:
                self.blocks.computed(sequence, sequence.num_tokens - 1)
                self.blocks.trim(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whether it waits or runs, and give back what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.move_to(SequenceStatus.FINISHED)

    def replace(self, parents: Iterable[Sequence], forks: Iterable[Fork]) -> None:
        """Put children in the place of their parents. They share blocks where parents run and there is room."""
        running = []
        for fork in forks:
            if fork.parent.status is SequenceStatus.RUNNING:
                held = self._residency.acquire(fork.child)
                assert held, "the parent holds the same adapters"
                self.blocks.share(fork)
                running.append(fork.child)
            else:
                self.waiting.put_back(fork.child)
        for parent in parents:
            self.finish(parent)
        for child in running:
            if len(self.running) < self._most_running:
                child.move_to(SequenceStatus.RUNNING)
                self.running.append(child)
            else:
                self._give_back(child)
                self.waiting.put_back(child)

    def _continue_running(self, chunks: list[Chunk], budget: int) -> int:
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        filling = [sequence for sequence in self.running if sequence.num_pending > 1]
        for sequence in decoding:
            if budget == 0:
                break
            if sequence.status is SequenceStatus.RUNNING and self._grow(sequence, chunks):
                chunks.append(self._chunk(sequence, 1))
                budget -= 1
        for sequence in filling:
            if sequence.status is SequenceStatus.RUNNING and self._grow(sequence, chunks):
                budget = self._left(chunks)
                if self._fits(sequence, chunks, budget):
                    self._fill(sequence, chunks, budget)
        return self._left(chunks)

    def _add_drafts(self, chunks: list[Chunk], drafts: Mapping[Sequence, tuple[int, ...]]) -> None:
        budget = self._left(chunks)
        for place, chunk in enumerate(chunks):
            sequence = chunk.sequence
            draft = drafts.get(sequence, ())[: max(budget, 0)]
            if draft and chunk.samples and chunk.num_sampled == 1:
                draft = draft[: self.blocks.extend(sequence, len(draft))]
                budget -= len(draft)
                chunks[place] = chunk.drafting(draft) if draft else chunk

    def _left(self, chunks: list[Chunk]) -> int:
        # Counted anew, for a preemption may have taken chunks out again.
        return self.limits.max_num_batched_tokens - sum(chunk.count for chunk in chunks)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        passed: list[Sequence] = []
        while budget > 0 and len(self.running) < self._most_running:
            sequence = self.waiting.first
            if sequence is None:
                break
            if sequence.parked:
                passed.append(self.waiting.pass_by())
                continue
            if not self._fits(sequence, chunks, budget):
                break
            if not self._acquire(sequence):
                if sequence.bypassed >= self.limits.max_bypasses:
                    break
                passed.append(self.waiting.pass_by())
                continue
            # Each running sequence may soon want one more block: a newcomer that takes the last ones would be preempted
            # after its prefill was paid for.
            if not self.blocks.open(sequence, reserve=len(self.running)):
                self._residency.release(sequence)
                break
            self.waiting.admit()
            sequence.move_to(SequenceStatus.RUNNING)
            self.running.append(sequence)
            for older in passed:
                older.bypassed += not older.parked
            budget -= self._fill(sequence, chunks, budget)
        self.waiting.restore(passed)

    def _acquire(self, sequence: Sequence) -> bool:
        try:
            return self._residency.acquire(sequence)
        except EngineError as error:
            self.refused[sequence.request.request_id] = error
            return False

    @property
    def _most_running(self) -> int:
        # Every running sequence can decode in every step, so none of them waits for another to end.
        return min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)

    def _fits(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> bool:
        """Whether a prompt that must not be split has room in this step; alone in a step it always has."""
        return self.limits.split_prefill or sequence.num_pending <= budget or not chunks

    def _fill(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> int:
        """Plan a prefill chunk within the budget; return how many tokens it takes."""
        count = min(sequence.num_pending, budget) if self.limits.split_prefill else sequence.num_pending
        if count > 0:
            chunks.append(self._chunk(sequence, count))
        return min(count, budget)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        last = sequence.num_computed + count == sequence.num_tokens
        wants_prompt = sequence.request.sampling.prompt_logprobs is not None and sequence.num_output == 0
        return Chunk(sequence, sequence.num_computed, count, count if wants_prompt else int(last))

    def _grow(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """Make room for the sequence's pending token, preempting younger ones; False: it was preempted itself."""
        while missing := self.blocks.missing(sequence):
            if missing <= self.blocks.pool.num_free:
                self.blocks.grow(sequence)
                break
            victim = _youngest(self.running)
            self._preempt(victim, chunks)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, chunks: list[Chunk]) -> None:
        chunks[:] = [chunk for chunk in chunks if chunk.sequence is not sequence]
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.move_to(SequenceStatus.WAITING)
        self.num_preemptions += 1
        self.waiting.put_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.close(sequence)
        self._residency.release(sequence)


def _youngest(sequences: list[Sequence]) -> Sequence:
    """Return the one that came last; of beams, which came together, the last one."""
    return max(reversed(sequences), key=lambda sequence: sequence.arrival)
