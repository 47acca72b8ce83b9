"""Drives a scheduler over a FakeRunner without an engine, and checks every step."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from ovms_lora.core.request import GenerationRequest
from ovms_lora.engine.beam import BeamSearch
from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.draw import FloatArray
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.sampler import Sampler
from ovms_lora.engine.scheduler import Chunk, Scheduler, SchedulerLimits
from ovms_lora.engine.sequence import Sequence, SequenceStatus
from tests.fakes import FakeRunner, byte_tokenizer


@dataclass(frozen=True)
class FakeAdapter:
    """An adapter that is nothing but its identity."""

    digest: str
    max_rank: int = 4
    chat_template: None = None


class ContextRunner(FakeRunner):
    """A fake whose slots depend, as keys and values do, on all tokens before them and on the adapters."""

    def _write(self, chunk: Chunk) -> None:
        sequence, size = chunk.sequence, self.block_size
        for position, token in enumerate(chunk.token_ids, start=chunk.start):
            before = self._read(chunk, position)[-1:] or sequence.request.adapters
            value = zlib.crc32(repr((before, token)).encode())
            self._cache[sequence.blocks[position // size], position % size] = value


class MoodyResidency:
    """Refuses as often as it was told to, and knows who holds adapters."""

    def __init__(self) -> None:
        self.refusals = 0
        self.held: list[Sequence] = []

    def acquire(self, sequence: Sequence) -> bool:
        beside_its_like = any(holder.request is sequence.request for holder in self.held)
        if self.refusals and not beside_its_like:
            self.refusals -= 1
            return False
        self.held.append(sequence)
        return True

    def release(self, sequence: Sequence) -> None:
        self.held.remove(sequence)


class Stepper:
    """One scheduler, pool and fake device. Requests with a beam width search, others sample."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        num_blocks: int,
        block_size: int,
        residency: MoodyResidency | None = None,
        before_step: Callable[[Seq[Chunk]], None] | None = None,
        copies_blocks: bool = True,
    ) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks, block_size)
        self.runner = ContextRunner(
            num_blocks=num_blocks, block_size=block_size, before_step=before_step, copies_blocks=copies_blocks
        )
        self.residency = residency or MoodyResidency()
        self.scheduler = Scheduler(self.pool, limits, self.residency, copies_blocks=copies_blocks)
        self.sampler = Sampler()
        self.output = OutputProcessor(byte_tokenizer(), [], num_blocks * block_size)
        self.finished: list[Sequence] = []
        self.searches: dict[Sequence, BeamSearch] = {}  # of each beam of now
        self.found: dict[BeamSearch, list[list[int]]] = {}

    def add(self, request: GenerationRequest) -> list[Sequence]:
        count = request.sampling.n if request.sampling.beam_width == 1 else 1
        sequences = [Sequence(request, index) for index in range(count)]
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def search(self, request: GenerationRequest) -> BeamSearch:
        (root,) = self.add(request)
        self.output.add(root)
        self.searches[root] = search = BeamSearch(root, self.output)
        return search

    def cancel(self, sequence: Sequence) -> None:
        """Take out a sequence, with all other beams of its search."""
        search = self.searches.get(sequence)
        for each in [beam for beam, of in self.searches.items() if of is search] if search else [sequence]:
            self.searches.pop(each, None)
            self.scheduler.finish(each)

    def step(self, drafts: Mapping[Sequence, tuple[int, ...]] | None = None) -> list[Chunk]:
        """Schedule, run and sample once; end sequences that have all their tokens."""
        chunks = self.scheduler.schedule(drafts)
        self.check_plan(chunks)
        self.runner.copy_blocks(self.scheduler.copies)
        logits = self.runner.run(chunks)
        self.scheduler.computed(chunks)
        ends = np.cumsum([chunk.num_sampled for chunk in chunks], dtype=np.int64)
        assert len(logits) == (ends[-1] if chunks else 0)
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.draft:
                self._check_draft(chunk, logits[end - chunk.num_sampled : end])
        rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples and not chunk.draft]
        sampling = [chunk.sequence for chunk in chunks if chunk.samples and not chunk.draft]
        for sequence, sampled in zip(sampling, self.sampler.sample(logits[rows], sampling), strict=True):
            assert sampled is not None
            if sequence in self.searches:
                continue
            self._append(sequence, sampled.token_id)
        for row, sequence in zip(rows, sampling, strict=True):
            if sequence in self.searches:
                self._offer(sequence, logits[row])
        self.scheduler.accepted(chunks)
        self.check_books()
        return chunks

    def _check_draft(self, chunk: Chunk, logits: FloatArray) -> None:
        sequence = chunk.sequence
        for place, row in enumerate(logits):
            (sampled,) = self.sampler.sample(row[None], [sequence])
            assert sampled is not None
            self._append(sequence, sampled.token_id)
            right = chunk.draft[place : place + 1] == (sampled.token_id,)
            if sequence.status is SequenceStatus.FINISHED or not right:
                break

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        if sequence.num_output == sequence.request.sampling.max_tokens:
            self.scheduler.finish(sequence)
            self.finished.append(sequence)

    def _offer(self, sequence: Sequence, row: FloatArray) -> None:
        search = self.searches[sequence]
        search.offer(sequence, row, row)
        if not search.ready:
            return
        parents = [beam for beam, of in self.searches.items() if of is search]
        forks = search.advance()
        self.scheduler.replace(parents, forks)
        for parent in parents:
            del self.searches[parent]
        self.searches.update({fork.child: search for fork in forks})
        if not forks:
            self.found[search] = [list(result.token_ids) for result in search.results]

    def run_to_the_end(self) -> int:
        """Step until nothing is left, in no more steps than the work can need; return their number."""
        live = [*self.scheduler.waiting, *self.scheduler.running]
        # Beams that have room for one of them only are computed one after another, each from the beginning.
        work = [(s.num_tokens + (s.request.sampling.max_tokens or 0)) * s.request.sampling.beam_width**2 for s in live]
        bound = 64 + self.residency.refusals + 2 * sum(work) * 4
        steps = 0
        while self.scheduler.has_work:
            assert steps < bound, "a sequence starves"
            self.step()
            steps += 1
        return steps

    def check_plan(self, chunks: Seq[Chunk]) -> None:
        limits, size = self.limits, self.pool.block_size
        assert len(self.scheduler.running) <= limits.max_num_seqs
        total = sum(chunk.count for chunk in chunks)
        assert total <= limits.max_num_batched_tokens or (len(chunks) == 1 and not limits.split_prefill)
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            assert sequence.status is SequenceStatus.RUNNING
            assert chunk.start == sequence.num_computed
            assert chunk.start < end - len(chunk.draft) <= sequence.num_tokens
            assert not chunk.draft or end - len(chunk.draft) == sequence.num_tokens
            assert chunk.count == len(chunk.token_ids)
            assert len(sequence.blocks) * size >= end
            assert all(self.pool.references(block) == 1 for block in sequence.blocks[chunk.start // size :])
            if not limits.split_prefill:
                assert end - len(chunk.draft) == sequence.num_tokens

    def check_books(self) -> None:
        scheduler, pool = self.scheduler, self.pool
        for block in range(pool.num_blocks):
            holders = sum(sequence.blocks.count(block) for sequence in scheduler.running)
            assert pool.references(block) == holders
        assert all(len(sequence.blocks) <= pool.blocks_for(sequence.num_tokens) for sequence in scheduler.running)
        assert pool.num_free == sum(pool.references(block) == 0 for block in range(pool.num_blocks))
        assert all(not sequence.blocks for sequence in [*scheduler.waiting, *self.finished])
        assert scheduler.waiting.backlog.requests == len({s.request.request_id for s in scheduler.waiting})
        flows: dict[tuple[str, str] | None, list[int]] = {}
        for sequence in scheduler.waiting:
            adapters = sequence.request.adapters
            flow = None if sequence.had_turn else (sequence.request.owner, adapters[0].digest if adapters else "")
            flows.setdefault(flow, []).append(sequence.arrival)
        assert all(arrivals == sorted(arrivals) for arrivals in flows.values())
        assert sorted(s.arrival for s in self.residency.held) == sorted(s.arrival for s in scheduler.running)


def results_alone(request: GenerationRequest) -> list[list[int]]:
    """Return what a beam search finds when it is alone on a device with room for everything."""
    return list(_search_alone(_Hashable(request)))


def tokens_alone(request: GenerationRequest, index: int) -> list[int]:
    """Return what a sequence gives when it is alone on a device with room for everything."""
    return list(_all_alone(_Hashable(request))[index])


class _Hashable:
    def __init__(self, request: GenerationRequest) -> None:
        sampling = request.sampling
        self.request = request
        chosen_by = (sampling.seed, sampling.temperature, sampling.max_tokens, sampling.n, sampling.beam_width)
        self.key = (request.prompt_token_ids, request.adapters, *chosen_by)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=4096)
def _all_alone(hashable: _Hashable) -> list[list[int]]:
    return [run_alone(hashable.request, index) for index in range(hashable.request.sampling.n)]


def run_alone(request: GenerationRequest, index: int) -> list[int]:
    """As `tokens_alone`, and keeps nothing of the request."""
    stepper = Stepper(SchedulerLimits(prefix_caching=False), num_blocks=64, block_size=4)
    sequence = Sequence(request, index)
    stepper.scheduler.add(sequence)
    stepper.run_to_the_end()
    return sequence.output_token_ids


@functools.lru_cache(maxsize=4096)
def _search_alone(hashable: _Hashable) -> list[list[int]]:
    stepper = Stepper(SchedulerLimits(prefix_caching=False), num_blocks=64, block_size=4)
    search = stepper.search(hashable.request)
    stepper.run_to_the_end()
    return stepper.found[search]
