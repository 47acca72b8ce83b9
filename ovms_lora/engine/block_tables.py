"""BlockTables: which KV-cache blocks a sequence gets, as it is admitted, grows, forks and ends.

    parent    [ 12 | 7 | 3 ]           full blocks are shared for good; the last one until a sequence writes into it
    children  [ 12 | 7 | 3 ]           that one gets a copy: [ 12 | 7 | 9 ], copies = [3 → 9]

Owns what a sequence finds in the prefix cache and leaves there. Who gets blocks, and who gives way, is the scheduler's
decision; counts and keys are the pool's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.sequence import Fork, Sequence


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """All keys and values of block `source` are to stand in block `target` as well."""

    source: int
    target: int


class BlockTables:
    """Fills `Sequence.blocks` from one pool, and counts in tokens what was looked for and found in the prefix cache.

    `copies` are to be made in their order before the next step. On a device that cannot, `copies_blocks` is False, and
    a forked sequence computes the tokens of its last block anew.
    """

    def __init__(self, pool: BlockPool, *, prefix_caching: bool, copies_blocks: bool = True) -> None:
        self.pool = pool
        self.copies: list[BlockCopy] = []
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._prefix_caching = prefix_caching
        self._copies_blocks = copies_blocks

    def open(self, sequence: Sequence, *, reserve: int) -> bool:
        """Give a sequence blocks for all tokens it has, the known prefix from the cache.

        False when fewer than `reserve` blocks would stay free; then nothing has changed.
        """
        cached = self._cached(sequence)
        missing = self.pool.blocks_for(sequence.num_tokens) - len(cached)
        if missing + reserve > self.pool.num_free:
            self.pool.release(cached)
            return False
        sequence.blocks = cached + self.pool.allocate(missing)
        sequence.num_computed = len(cached) * self.pool.block_size
        self.prefix_queries += sequence.num_tokens
        self.prefix_hits += sequence.num_computed
        if sequence.num_cached is None:  # what a preempted sequence finds again is its own work
            sequence.num_cached = sequence.num_computed
        return True

    def missing(self, sequence: Sequence) -> int:
        """Return how many free blocks the sequence needs for its pending tokens."""
        return self.pool.blocks_for(sequence.num_tokens) - len(sequence.blocks) + self._writes_shared(sequence)

    def grow(self, sequence: Sequence) -> None:
        """Give a sequence the blocks that it misses, and a copy of the one that it would write into but shares."""
        new = self.pool.allocate(self.missing(sequence))
        if self._writes_shared(sequence):
            place = sequence.num_computed // self.pool.block_size
            self.copies.append(BlockCopy(sequence.blocks[place], new[0]))
            self.pool.release([sequence.blocks[place]])
            sequence.blocks[place] = new.pop(0)
        sequence.blocks += new

    def extend(self, sequence: Sequence, count: int) -> int:
        """Make room for up to `count` tokens after a sequence's own, as far as blocks are free; return for how many."""
        size = self.pool.block_size
        room = (len(sequence.blocks) + self.pool.num_free) * size - sequence.num_tokens
        count = min(count, room)
        missing = self.pool.blocks_for(sequence.num_tokens + count) - len(sequence.blocks)
        sequence.blocks += self.pool.allocate(max(missing, 0))
        return count

    def trim(self, sequence: Sequence) -> None:
        """Take the blocks in which none of a sequence's tokens stands or will stand next."""
        needed = self.pool.blocks_for(sequence.num_tokens)
        self.pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    def share(self, fork: Fork) -> None:
        """Let a child hold the blocks of what its parent has computed."""
        parent, child = fork.parent, fork.child
        size = self.pool.block_size
        known = parent.num_computed if self._copies_blocks else parent.num_computed // size * size
        child.blocks = parent.blocks[: self.pool.blocks_for(known)]
        child.num_computed = known
        self.pool.retain(child.blocks)

    def _writes_shared(self, sequence: Sequence) -> bool:
        place = sequence.num_computed // self.pool.block_size
        return place < len(sequence.blocks) and self.pool.references(sequence.blocks[place]) > 1

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """Note that so many tokens of a sequence stand in its blocks; full ones can be found from now on."""
        size = self.pool.block_size
        full_before, full = sequence.num_computed // size, num_computed // size
        sequence.num_computed = num_computed
        if self._prefix_caching and full > full_before:
            keys = sequence.prefix_keys(full, size)
            for i in range(full_before, full):
                self.pool.remember(sequence.blocks[i], keys[i])

    def close(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it has computed nothing then."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0

    def _cached(self, sequence: Sequence) -> list[int]:
        if not self._prefix_caching or sequence.request.sampling.prompt_logprobs is not None:
            return []  # log-probabilities of the prompt need its logits, so all of it is computed
        # The last token is always computed: its logits choose the next one.
        full = (sequence.num_tokens - 1) // self.pool.block_size
        return self.pool.take_cached(sequence.prefix_keys(full, self.pool.block_size))
