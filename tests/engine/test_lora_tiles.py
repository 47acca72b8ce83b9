"""Where a step runs: few tiles when few are in use, the same numbers everywhere, and no copy of what has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from ovms_lora.engine import lora_states
from ovms_lora.engine.lora_rows import SequenceTiles
from ovms_lora.engine.lora_states import TileIndices
from ovms_lora.engine.lora_tiles import LoraTiles
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence as EngineSequence
from tests.engine.fake_tiles import FakeTiles
from tests.engine.harness import request
from tests.engine.lora_models import LINEARS, Ask, Bases, drift, log_probabilities, prompt, serving
from tests.engine.test_residency import ADAPTERS
from tests.engine.toy_graph import SHAPES, adapter, toy

LARGE, SMALL = 1000.0, 5.0  # models, in tiles


class FakeStates(FakeTiles):
    """Tiles that can be copied, as long as there is memory."""

    refuses, copies = False, 0
    room = 1000
    held: Sequence[int] = ()

    def resize(self, count: int) -> None:
        if count > self.room:
            raise MemoryError
        super().resize(count)
        self.held = self.held[:count]

    def take(self, tiles: TileIndices, other: FakeStates) -> None:
        if self.refuses:
            self.owner = ["half"] * len(self.owner)
            raise MemoryError
        self.copies += 1
        self.held = tiles.tolist()
        self.resize(len(tiles))
        self.owner = [other.owner[tile] for tile in tiles]


class Device:
    """LoraTiles over fake states."""

    def __init__(self, count: int = 8, model_size: float = LARGE) -> None:
        self.resident, self.active = FakeStates(), FakeStates()
        self.tiles = LoraTiles(self.resident, self.active, model_size=model_size)  # type: ignore[arg-type]
        self.tiles.resize(count)

    def step(self, *rows: tuple[int, ...]) -> list[bool]:
        """Plan a step with chunks of (tokens, tile, tile, …)."""
        return list(self.tiles.divide([chunk(*each) for each in rows]))


def chunk(count: int, *tiles: int) -> Chunk:
    sequence = EngineSequence(request(prompt="x" * count), 0)
    sequence.tiles = SequenceTiles(np.array(tiles), np.ones(len(tiles), np.float32)) if tiles else None
    return Chunk(sequence, 0, count, 1)


def test_one_of_many_has_a_tile_of_its_own_soon() -> None:
    device = Device()
    steps = [device.step((1, 3), (1,)) for _ in range(20)]
    assert steps[0] == [False, False], "one step does not pay for a copy"
    assert steps[5:] == [[True, True]] * 15
    assert (device.active.count, device.active.copies) == (1, 1)


def test_all_that_are_in_use_stay_where_they_are() -> None:
    device = Device()
    for _ in range(50):
        assert not any(device.step(*((1, tile) for tile in range(5))))
    assert not device.active.copies


def test_a_prompt_has_its_tile_at_once() -> None:
    device = Device()
    assert device.step((200, 3)) == [True]


def test_a_long_prompt_beside_others_is_computed_apart_from_them_where_that_pays() -> None:
    rows = [(200, 7), *((1, tile) for tile in range(7)), (1,)]
    assert Device(model_size=SMALL).step(*rows) == [True] + [False] * 8
    assert not any(Device(model_size=LARGE).step(*rows))


def test_prompts_of_a_few_together_are_not_divided() -> None:
    assert Device(model_size=SMALL).step((100, 1), (90, 2), (60,)) == [True] * 3


def test_who_takes_turns_is_not_copied_in_every_step() -> None:
    device = Device()
    for number in range(100):
        device.step((1, number % 8))
    assert 0 < device.active.copies <= 100 * 8 * 7 / 64, "copies cost no more than staying would have"


def test_a_copy_of_more_than_is_used_serves_as_well() -> None:
    device = Device()
    while not all(device.step((1, 2), (1, 5))):
        pass
    assert device.step((1, 5)) == device.step((1, 2)) == [True]
    assert device.step((1, 5), (1, 6)) == [False, False]


def test_where_memory_is_refused_all_run_on_what_is_there() -> None:
    device = Device()
    device.active.refuses = True
    assert device.step((200, 3)) == [False]
    device.active.refuses = False
    assert device.step((200, 3)) == [True]


def test_a_copy_that_failed_half_way_is_not_used() -> None:
    device = Device()
    assert device.step((200, 3)) == [True]
    device.active.refuses = True
    assert device.step((200, 5)) == [False]
    assert device.step((1, 3)) == [False]


def test_where_fewer_copies_are_refused_nothing_runs_on_those_that_were_there() -> None:
    device = Device()
    assert device.step((200, 0), (200, 1), (200, 2)) == [True] * 3
    device.active.refuses = True
    assert device.step((200, 0)) == [False]
    assert not device.active.count


def test_copies_make_room_for_an_adapter() -> None:
    device = Device()
    assert device.step((200, 3)) == [True]

    def scarce(count: int) -> None:
        if device.active.count:
            raise MemoryError
        FakeStates.resize(device.resident, count)

    with mock.patch.object(device.resident, "resize", scarce):
        device.tiles.resize(9)
    assert (device.tiles.count, device.active.count) == (9, 0)
    device.resident.room = 9
    with pytest.raises(MemoryError):
        device.tiles.resize(10)


def test_what_is_overwritten_goes_and_its_neighbours_stay() -> None:
    device = Device()
    assert device.step((200, 3), (200, 5)) == [True, True]
    device.tiles.write(np.array([5]), ADAPTERS["a"])
    assert device.step((1, 3)) == [True]
    assert device.step((1, 5)) == [False]


def test_one_set_does_not_pay_for_another() -> None:
    device = Device(count=32)
    ten = [(1, tile) for tile in range(10)]
    for number in range(15):
        if number % 5 == 4:
            assert device.step((200, 20)) == [True]
        if all(device.step(*ten)):
            break
    else:
        pytest.fail("the ten never get their tiles")


def test_copies_go_with_what_they_were_made_of() -> None:
    device = Device()
    assert device.step((200, 7)) == [True]
    device.tiles.resize(7)
    assert device.active.count == 0


class Changes(RuleBasedStateMachine):
    """Adapters come and go between steps; what runs on a copy runs on what stands in the resident tile now."""

    @initialize(count=st.integers(1, 9), model_size=st.sampled_from([SMALL, LARGE]))
    def start(self, count: int, model_size: float) -> None:
        self.device = Device(count, model_size)

    @rule(digest=st.sampled_from(sorted(ADAPTERS)), seed=st.integers(0, 99))
    def write(self, digest: str, seed: int) -> None:
        count = -(-ADAPTERS[digest].max_rank // 2)
        if count <= self.device.tiles.count:
            tiles = np.random.default_rng(seed).permutation(self.device.tiles.count)[:count]
            self.device.tiles.write(tiles, ADAPTERS[digest])

    @rule(count=st.integers(1, 9))
    def resize(self, count: int) -> None:
        self.device.tiles.resize(count)

    @rule(
        rows=st.lists(st.tuples(st.sampled_from([1, 2, 9, 60]), st.sets(st.integers(0, 8), max_size=3)), min_size=1),
        times=st.integers(1, 8),
        refuses=st.booleans(),
    )
    def step(self, rows: list[tuple[int, set[int]]], times: int, refuses: bool) -> None:
        device = self.device
        chunks = [chunk(count, *(tile for tile in tiles if tile < device.tiles.count)) for count, tiles in rows]
        for _ in range(times):
            device.active.refuses = refuses
            for each, on_active in zip(chunks, device.tiles.divide(chunks), strict=True):
                used = each.sequence.tiles.tiles.tolist() if each.sequence.tiles else []
                if on_active:
                    assert device.tiles._copied.issuperset(used)
        places = dict(zip(device.active.held, device.active.owner, strict=True))
        assert all(places[tile] == device.resident.owner[tile] for tile in device.tiles._copied)


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("fails_at", range(6))
@pytest.mark.parametrize("taken", [[2], [2, 3]], ids=["as many", "more"])
def test_a_device_that_fails_half_way_leaves_no_tiles_and_takes_them_again(taken: list[int], fails_at: int) -> None:
    made = toy(tiles=4)
    for tile in range(4):
        made.states.write(np.array([tile]), adapter(dict.fromkeys(SHAPES, 2), seed=tile))
    other = made.beside()
    other.states.take(np.array([1]), made.states)
    calls = 0

    def failing(really: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                raise MemoryError
            return really(*arguments)

        return call

    with mock.patch("ovms_lora.engine.lora_states._copy_tiles", failing(lora_states._copy_tiles)):
        with pytest.raises(MemoryError):
            other.states.take(np.array(taken), made.states)
        assert other.states.count == 0
    other.states.take(np.array(taken), made.states)
    use = {0: SequenceTiles(np.array([2]), np.ones(1, np.float32))}
    x = np.ones((1, 4), np.float32)
    for found, wanted in zip(other.run(x, use), made.run(x, use), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_copies_give_the_same_numbers_to_the_bit(dtype: str) -> None:
    made = toy(dtype=dtype, tiles=7)
    for tile in range(7):
        made.states.write(np.array([tile]), adapter(dict.fromkeys(SHAPES, 2), seed=tile))
    other = made.beside()
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    for tiles in ([1], [4, 6], [0, 5], [2, 3, 4, 6]):
        uses = {
            row: SequenceTiles(rng.choice(tiles, size, replace=False), rng.normal(size=size).astype(np.float32))
            for row, size in enumerate(rng.integers(1, min(len(tiles), 2) + 1, size=5))
        }
        other.states.take(np.array(tiles), made.states)
        assert other.states.count == len(tiles)
        for found, wanted in zip(other.run(x, uses), made.run(x, uses), strict=True):
            np.testing.assert_array_equal(found, wanted)


def divisions(asks: Sequence[Ask], served: Any) -> tuple[list[Any], list[npt.NDArray[np.bool_]]]:
    """Answer requests together; return the answers and what was decided of each step with adapters."""
    decided = []
    really = LoraTiles.divide

    def noted(self: LoraTiles, chunks: Sequence[Chunk]) -> npt.NDArray[np.bool_]:
        decided.append(really(self, chunks))
        return decided[-1]

    with mock.patch.object(LoraTiles, "divide", noted):
        return served.together(*asks), decided


def test_a_divided_step_has_the_numbers_of_peft(bases: Bases, tmp_path: Any) -> None:
    llama = bases.get("llama")
    folders = {f"a{n}": llama.adapter(tmp_path / f"a{n}", seed=n, target_modules=list(LINEARS)) for n in range(8)}
    prompts = {name: prompt(150 if name == "a5" else 3, seed=9) for name in folders}
    with serving(llama.folder, folders, max_loras=8) as served:
        asks = {
            name: Ask(tokens, served.lora.select(name), 9, logprobs=20, prompt_logprobs=20)
            for name, tokens in prompts.items()
        }
        answers, decided = divisions(list(asks.values()), served)
        assert any(mask.any() and not mask.all() for mask in decided), "a step was divided"
        alone, decided = divisions([asks["a5"]], served)
        assert decided[-1].all(), "the one that is in use has a tile of its own"
    for (name, tokens), answer in zip([*prompts.items(), ("a5", prompts["a5"])], [*answers, *alone], strict=True):
        expected = log_probabilities(llama.with_peft((folders[name], 1.0)), [*tokens, *answer.token_ids])
        assert drift(answer, tokens, expected) <= 0.001
    assert alone[0].token_ids == answers[5].token_ids
