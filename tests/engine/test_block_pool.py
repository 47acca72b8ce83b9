"""The block pool against a simple model: no block lost, none shared wrongly, no cached block under another's key."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ovms_lora.engine.block_pool import BlockPool, PrefixKey, prefix_key, prefix_root

KEYS = [prefix_key(b"", [number]) for number in range(5)]


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables are what sequences hold; `free` is the model's free list, oldest first; `keys` what blocks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[int]] = []
        self.free: list[int] = []
        self.keys: dict[PrefixKey, int] = {}

    @initialize(num_blocks=st.integers(1, 8))
    def make_pool(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, block_size=4)
        self.free = list(range(num_blocks))

    def count(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.free)))
        blocks = self.pool.allocate(count)
        assert blocks == self.free[:count]
        del self.free[:count]
        self.keys = {key: block for key, block in self.keys.items() if block not in blocks}
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.retain(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        self.free += [block for block in reversed(table) if self.count(block) == 0]

    @precondition(lambda self: any(self.tables) and self.free)
    @rule(data=st.data())
    def fork_and_write(self, data: st.DataObject) -> None:
        """A second holder of a table gets a block of its own in the place of the last one."""
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        self.pool.retain(table)
        (own,) = self.pool.allocate(1)
        assert own == self.free.pop(0)
        self.keys = {key: block for key, block in self.keys.items() if block != own}
        self.pool.release(table[-1:])
        self.tables.append([*table[:-1], own])
        assert self.pool.references(table[-1]) == self.count(table[-1]) > 0

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def take_cached(self, keys: list[PrefixKey]) -> None:
        known = next((at for at, key in enumerate(keys) if key not in self.keys), len(keys))
        blocks = self.pool.take_cached(keys)
        assert blocks == [self.keys[key] for key in keys[:known]]
        self.free = [block for block in self.free if block not in blocks]
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def remember(self, data: st.DataObject, key: PrefixKey) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        self.pool.remember(block, key)
        if key not in self.keys and block not in self.keys.values():
            self.keys[key] = block

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.keys.clear()

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        held = {block for table in self.tables for block in table}
        assert self.pool.num_free == len(self.free)
        assert held.isdisjoint(self.free)
        assert len(held) + len(self.free) == self.pool.num_blocks

    @invariant()
    def counts_are_those_of_the_tables(self) -> None:
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == self.count(block)
        assert self.pool.num_cached == len(self.keys)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=80, stateful_step_count=30)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(8, block_size=4).blocks_for(tokens) == blocks


def test_the_end_of_a_released_prefix_is_handed_out_before_its_beginning() -> None:
    pool = BlockPool(3, block_size=4)
    blocks = pool.allocate(3)
    pool.release(blocks)
    assert pool.allocate(3) == blocks[::-1]


def test_prefix_keys_tell_tokens_order_and_parents_apart() -> None:
    root = prefix_root("")
    keys = {
        prefix_key(root, [1, 2]),
        prefix_key(root, [2, 1]),
        prefix_key(root, [1]),
        prefix_key(root, [1 + 256 * 2]),
        prefix_key(prefix_key(root, [1, 2]), [1, 2]),
        prefix_key(prefix_root("x"), [1, 2]),
    }
    assert len(keys) == 6


@pytest.mark.parametrize(("one", "other"), [(("a", "b"), ("ab",)), (("a", ""), ("a",)), (("a", "b"), ("b", "a"))])
def test_prefix_roots_tell_the_borders_of_their_parts_apart(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert prefix_root(*one) != prefix_root(*other)


def test_more_blocks_than_are_free_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        BlockPool(2, block_size=4).allocate(3)


def test_a_block_released_twice_is_a_bug_of_the_caller() -> None:
    pool = BlockPool(2, block_size=4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)
