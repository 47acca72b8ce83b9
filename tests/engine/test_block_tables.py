"""Blocks of sequences that fork: shared while they are read, copied when a second holder writes."""

from __future__ import annotations

from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.block_tables import BlockCopy, BlockTables
from ovms_lora.engine.sequence import Fork, Sequence

SIZE = 4


def tables(*, copies_blocks: bool = True) -> BlockTables:
    return BlockTables(BlockPool(16, SIZE), prefix_caching=True, copies_blocks=copies_blocks)


def computed(blocks: BlockTables, length: int) -> Sequence:
    """Return a sequence whose tokens are all computed."""
    sequence = Sequence(GenerationRequest("r", tuple(range(length)), SamplingParams()), 0)
    assert blocks.open(sequence, reserve=0)
    blocks.computed(sequence, length)
    return sequence


def forked(blocks: BlockTables, parent: Sequence, count: int) -> list[Sequence]:
    """Let children take the parent's place, each with one token more."""
    children = [parent.fork() for _ in range(count)]
    for token, child in enumerate(children):
        child.token_ids.append(token)
        blocks.share(Fork(parent, child))
    blocks.close(parent)
    return children


def test_the_last_holder_of_an_open_block_writes_into_it_and_the_others_into_copies() -> None:
    blocks = tables()
    parent = computed(blocks, 6)
    full, half = parent.blocks
    children = forked(blocks, parent, 3)
    assert [blocks.missing(child) for child in children] == [1, 1, 1]
    for child in children:
        blocks.grow(child)
    assert [child.blocks[0] for child in children] == [full] * 3
    assert children[2].blocks[1] == half
    assert blocks.copies == [BlockCopy(half, child.blocks[1]) for child in children[:2]]
    assert len({child.blocks[1] for child in children}) == 3


def test_an_only_child_goes_on_in_the_blocks_of_its_parent() -> None:
    blocks = tables()
    parent = computed(blocks, 6)
    held = parent.blocks
    (child,) = forked(blocks, parent, 1)
    blocks.grow(child)
    assert (child.blocks, blocks.copies) == (held, [])


def test_full_blocks_are_never_copied() -> None:
    blocks = tables()
    children = forked(blocks, computed(blocks, 8), 3)
    for child in children:
        blocks.grow(child)
    assert blocks.copies == []
    assert len({child.blocks[2] for child in children}) == 3


def test_without_copies_a_child_computes_the_open_block_anew() -> None:
    blocks = tables(copies_blocks=False)
    children = forked(blocks, computed(blocks, 6), 2)
    assert [(child.num_computed, child.num_pending) for child in children] == [(4, 3)] * 2
    for child in children:
        blocks.grow(child)
    assert blocks.copies == []
    assert children[0].blocks[1] != children[1].blocks[1]


def test_all_blocks_are_free_when_the_last_child_has_ended() -> None:
    blocks = tables()
    children = forked(blocks, computed(blocks, 6), 3)
    for child in children:
        blocks.grow(child)
        blocks.close(child)
    assert blocks.pool.num_free == 16
