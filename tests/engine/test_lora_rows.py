"""The plan of a step: followed by hand it gives every row the sum over its own tiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.engine.lora_rows import RowSpan, SequenceTiles, TilePlan, TileSet, plan_tiles


def followed(plan: TilePlan, deltas: npt.NDArray[np.float64], chunks: int) -> npt.NDArray[np.float64]:
    """Do what the graph does: `deltas` [tiles, chunks] stands for what a tile gives for each chunk of row 1's input.

    Row r of the input is r + 1, so that a wrong row shows.
    """
    outer, tiles, inner = plan.tile_rows.shape
    d = (plan.tile_rows + 1.0)[:, None] * deltas.T[None, :, :, None]  # [m1, chunks, S, m2]
    flat = np.append(d.reshape(outer * chunks * tiles * inner), 0.0)
    result: npt.NDArray[np.float64] = plan.alpha[:, 0] * flat[plan.place(chunks)]
    np.add.at(result, plan.sum_rows[:, 0], plan.sum_alpha[:, 0] * flat[plan.sum_place(chunks)])
    return result


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[RowSpan], int, int]:
    num_tiles = draw(st.integers(1, 6))
    spans, begin = [], 0
    for _ in range(draw(st.integers(0, 6))):
        begin += draw(st.integers(0, 2))
        count = draw(st.integers(1, 5))
        tiles = draw(st.lists(st.integers(0, num_tiles - 1), min_size=1, max_size=num_tiles, unique=True))
        alphas = np.array([draw(st.sampled_from([-1.5, 0.5, 1.0, 2.0])) for _ in tiles], np.float32)
        spans.append(RowSpan(begin, count, SequenceTiles(np.array(tiles), alphas)))
        begin += count
    return spans, begin + draw(st.integers(0, 2)), num_tiles


@settings(max_examples=300, deadline=None)
@given(steps(), st.integers(1, 4), st.booleans())
def test_each_row_gets_the_sum_over_its_tiles(
    step: tuple[list[RowSpan], int, int], chunks: int, may_be_empty: bool
) -> None:
    spans, num_rows, num_tiles = step
    deltas = np.random.default_rng(0).integers(-9, 9, size=(num_tiles, chunks)).astype(np.float64)
    wanted = np.zeros((num_rows, chunks))
    for span in spans:
        for row in range(span.begin, span.begin + span.count):
            for tile, alpha in zip(span.use.tiles, span.use.alphas, strict=True):
                wanted[row] += alpha * (row + 1) * deltas[tile]
    plan = plan_tiles(spans, num_rows=num_rows, held=TileSet(num_tiles), may_be_empty=may_be_empty)
    assert plan.tile_rows.size or may_be_empty
    np.testing.assert_allclose(followed(plan, deltas, chunks), wanted)
    assert plan.tile_rows.dtype == plan.position.dtype == plan.place(chunks).dtype == plan.sum_rows.dtype == np.int32


def test_a_step_without_adapters_computes_nothing() -> None:
    plan = plan_tiles([], num_rows=3, held=TileSet(4), may_be_empty=True)
    assert plan.tile_rows.size == 0
    assert plan.place(2).tolist() == [[0, 0]] * 3, "one past the end of nothing"
    assert not plan.alpha.any() and not plan.sum_rows.size


def test_a_graph_without_tiles_takes_base_rows() -> None:
    plan = plan_tiles([], num_rows=2, held=TileSet(0), may_be_empty=True)
    assert plan.tile_rows.size == 0 and plan.place(1).tolist() == [[0], [0]]
