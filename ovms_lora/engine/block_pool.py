"""BlockPool: who holds which KV-cache block, and which free block still holds the keys and values of a known prefix.

    free list   oldest first ──► [ 7* 3  9* 4 ] ◄── newest     * = still cached under a prefix key
    in use      reference count ≥ 1, one count for each sequence that has the block in its table

A block is in the free list exactly when its count is 0. A cached block that is free can be taken back by `take_cached`
until `allocate` hands it out for other tokens. The pool counts; it holds no tensors and knows no sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

PrefixKey = bytes


def prefix_root(*parts: str) -> PrefixKey:
    """Return the key before the first token: what else than tokens decides the keys and values of a block."""
    digest = blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def prefix_key(parent: PrefixKey, token_ids: Sequence[int]) -> PrefixKey:
    """Return the key of a full block that holds `token_ids` after the prefix with key `parent`.

    A cryptographic hash: a client that could build two prefixes with one key would read another client's text.
    """
    digest = blake2b(parent, digest_size=16)
    digest.update(b"".join(token.to_bytes(4, "little") for token in token_ids))
    return digest.digest()


class BlockPool:
    """Blocks 0 … `num_blocks`-1, each with room for `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks))  # insertion order = age
        self._block_of: dict[PrefixKey, int] = {}
        self._key_of: dict[int, PrefixKey] = {}

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """How many blocks, held or free, can be found by a prefix key."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def references(self, block: int) -> int:
        """Return how many holders the block has."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks, least recently used first, each with one reference; what they held is forgotten."""
        assert count <= self.num_free, "the scheduler asks for free blocks only"
        blocks = []
        for _ in range(count):
            block = next(iter(self._free))
            del self._free[block]
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of these held blocks."""
        for block in blocks:
            assert self._references[block] > 0, "only a held block can be shared"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block; a block without references becomes free, and stays findable by its key.

        Blocks are given in the order of the sequence. They become free from the last to the first: the end of a prefix
        is worth less than its beginning, so it is handed out first.
        """
        for block in reversed(list(blocks)):
            assert self._references[block] > 0, "a block is released once by each holder"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def take_cached(self, keys: Iterable[PrefixKey]) -> list[int]:
        """Return the blocks of the longest run of known keys, from the first on, with one more reference each."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._free.pop(block, None)
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def remember(self, block: int, key: PrefixKey) -> None:
        """Make a held, full block findable; the first block with a key keeps it."""
        assert self._references[block] > 0, "only a held block has known content"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget_all(self) -> None:
        """Drop every prefix key: no later sequence finds a block of an earlier one."""
        self._block_of.clear()
        self._key_of.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
