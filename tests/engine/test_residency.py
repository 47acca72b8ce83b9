"""Who stands in the tiles: never two in one, nobody put out while in use, nothing lost, nobody starved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ovms_lora.adapters.adapter import Adapter, LoraPair
from ovms_lora.core.config import EngineOptions
from ovms_lora.core.request import AdapterUse, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.engine import Engine
from ovms_lora.engine.residency import LoraResidency
from ovms_lora.engine.sequence import Sequence
from tests.engine.fake_tiles import FakeTiles
from tests.engine.harness import TOKENIZER, Answers
from tests.fakes import EOS, FakeRunner


def adapter(digest: str, rank: int) -> Adapter:
    pair = LoraPair(np.zeros((rank, 1), np.float32), np.zeros((1, rank), np.float32), 1.0)
    return Adapter(digest, None, {"q_proj": pair}, np.dtype(np.float32))  # type: ignore[arg-type]  # no configuration


ADAPTERS = {digest: adapter(digest, rank) for digest, rank in {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 2}.items()}
DIGESTS = st.sampled_from(sorted(ADAPTERS))
USES = st.lists(st.tuples(DIGESTS, st.sampled_from([-1.5, 0.5, 1.0])), max_size=3)


def sequence(*uses: tuple[str, float], name: str = "r") -> Sequence:
    adapters = tuple(AdapterUse(ADAPTERS[digest], alpha) for digest, alpha in uses)
    return Sequence(GenerationRequest(name, (1,), SamplingParams(), adapters), 0)


class ResidencyMachine(RuleBasedStateMachine):
    """Sequences come and go; after each rule all the books are right."""

    @initialize(total_rank=st.integers(5, 12), max_loras=st.integers(1, 4))
    def start(self, total_rank: int, max_loras: int) -> None:
        self.states = FakeTiles()
        self.residency = LoraResidency(self.states, total_rank=total_rank, max_loras=max_loras)
        self.held: list[Sequence] = []
        self.pinned: set[str] = set()
        self.named = set(ADAPTERS)
        self.relaxed = False

    def in_use(self) -> set[str]:
        return {use.digest for each in self.held for use in each.request.adapters}

    def room_for(self, digests: set[str]) -> bool:
        ranks = [ADAPTERS[digest].max_rank for digest in digests]
        return len(ranks) <= self.residency.max_loras and sum(ranks) <= self.residency.total_rank

    @rule(uses=USES)
    def acquire(self, uses: list[tuple[str, float]]) -> None:
        new, before = sequence(*uses), set(self.residency.resident)
        wanted = {digest for digest, _ in uses}
        staying = before & self.pinned
        acquired = self.residency.acquire(new)
        after = set(self.residency.resident)
        if not acquired:
            assert after == before
            assert new.tiles is None
            # Refused only where those in use, and the pinned ones it could ever run beside, leave no room.
            least = self.in_use() | wanted | (staying if self.room_for(staying | wanted) else set())
            assert not self.room_for(least)
            return
        self.held.append(new)
        assert self.room_for(self.in_use() | wanted)
        assert wanted <= after
        assert list(self.residency.resident)[len(after) - len(wanted) :] == list(dict.fromkeys(d for d, _ in uses))
        if self.room_for(staying | wanted):
            assert staying <= after, "a pinned one has left"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        each = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.residency.release(each)
        assert each.tiles is None
        for use in each.request.adapters:
            if use.digest not in self.named and use.digest not in self.in_use():
                assert use.digest not in self.residency.resident

    @rule(pinned=st.sets(DIGESTS, max_size=2))
    def pin(self, pinned: set[str]) -> None:
        self.pinned = pinned & self.named
        self.residency.pin(self.pinned)

    @rule(named=st.sets(DIGESTS, min_size=3))
    def name_and_sweep(self, named: set[str]) -> None:
        before = set(self.residency.resident)
        self.named = named
        self.pinned &= named
        self.residency.name(named)
        self.residency.pin(self.pinned)
        self.residency.sweep()
        assert set(self.residency.resident) == {d for d in before if d in named or d in self.in_use()}

    @rule()
    def move(self) -> None:
        before = self.residency.resident
        self.states = FakeTiles()
        self.residency.move(self.states)
        assert self.residency.resident == before
        assert self.states.count == sum(-(-ADAPTERS[digest].max_rank // 2) for digest in before)

    @invariant()
    def nothing_is_shared_lost_or_put_out(self) -> None:
        if not hasattr(self, "residency"):
            return
        residents = self.residency.resident
        assert len(set(residents)) == len(residents) <= self.residency.max_loras
        assert self.in_use() <= set(residents)
        for digest in residents:  # all of its tiles are still its own
            assert len(self.states.tiles(digest)) >= -(-ADAPTERS[digest].max_rank // 2)
        taken = sum(ADAPTERS[digest].max_rank for digest in residents)
        assert self.residency.free_rank == self.residency.total_rank - taken
        in_tiles = [tile for digest in residents for tile in self.residency._residents[digest].tiles]
        assert sorted([*in_tiles, *self.residency._free]) == list(range(self.states.count)), "a tile is lost or shared"

    @invariant()
    def strengths_are_those_of_the_request(self) -> None:
        for each in getattr(self, "held", ()):
            uses = each.request.adapters
            if not uses:
                assert each.tiles is None
                continue
            assert each.tiles is not None
            found = dict(zip(each.tiles.tiles.tolist(), each.tiles.alphas.tolist(), strict=True))
            assert len(found) == len(each.tiles.tiles)
            for digest in {use.digest for use in uses}:
                alpha = sum(use.alpha for use in uses if use.digest == digest)
                tiles = self.residency._residents[digest].tiles.tolist()
                assert set(tiles) <= set(self.states.tiles(digest))
                assert [found.pop(tile) for tile in tiles] == [alpha] * len(tiles)
            assert not found


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def residency(total_rank: int = 8, max_loras: int = 3) -> LoraResidency:
    return LoraResidency(FakeTiles(), total_rank=total_rank, max_loras=max_loras)


def test_the_least_recently_used_goes_first() -> None:
    place = residency()
    for digest in ("a", "b", "c", "a"):
        each = sequence((digest, 1.0))
        assert place.acquire(each)
        place.release(each)
    assert place.acquire(sequence(("f", 1.0)))
    assert place.resident == ("c", "a", "f")


def test_a_resident_is_not_written_again() -> None:
    place = residency()
    for _ in range(3):
        each = sequence(("a", 1.0))
        place.acquire(each)
        place.release(each)
    assert place.brought_in == 1


def test_a_base_sequence_needs_no_tiles() -> None:
    place = LoraResidency(None, total_rank=0, max_loras=1)
    each = sequence()
    assert place.acquire(each)
    place.release(each)
    assert not place.acquire(sequence(("a", 1.0)))


def test_unused_tiles_at_the_end_are_given_back() -> None:
    place = residency(total_rank=12)
    states = place._states
    assert states
    for digest in ("a", "d", "c"):
        each = sequence((digest, 1.0))
        place.acquire(each)
        place.release(each)
    assert states.count == 1 + 2 + 2
    place.name({"d"})
    place.sweep()
    assert (place.resident, states.count) == (("d",), 3)
    place.name(set())
    place.sweep()
    assert (place.resident, states.count) == ((), 0)


def run(first: list[str], again: list[str], *, max_loras: int, total_rank: int, max_num_seqs: int) -> dict[str, int]:
    """Run one request per name in `first`, and in every step one more of `again` in turn.

    Returns, for the requests of `first`, the number of the step in which they ended.
    """
    answers, ended = Answers(), dict[str, int]()
    asked = [(f"{digest}{number}", digest) for number, digest in enumerate(first)]

    def request(name: str, digest: str) -> GenerationRequest:
        uses = (AdapterUse(ADAPTERS[digest]),)
        return GenerationRequest(name, (97, 98), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), uses)

    def one_more(_: object) -> None:
        step = len(runner.steps)
        for name, _digest in asked:
            if name in answers and answers[name].finished:
                ended.setdefault(name, step)
        if again and len(ended) < len(asked) and step < 2000:
            engine.submit(request(f"more{step}", again[step % len(again)]))

    runner = FakeRunner(num_blocks=64, before_step=one_more)
    engine = Engine(
        runner,
        TOKENIZER,
        EngineOptions(max_num_seqs=max_num_seqs),
        deliver=answers,
        max_model_len=64,
        eos_token_ids=[EOS],
        max_waiting=10_000,
        residency=LoraResidency(FakeTiles(), total_rank=total_rank, max_loras=max_loras),
    )
    requests = [request(name, digest) for name, digest in asked]
    for each in requests:
        engine.submit(each)
    engine.start()
    answers.wait(*requests)
    engine.stop(drain_seconds=20)
    return {name: ended.get(name, len(runner.steps)) for name, _ in asked}


@pytest.mark.parametrize("max_num_seqs", [2, 4, 16])
def test_one_busy_adapter_starves_nobody(max_num_seqs: int) -> None:
    ended = run(["a", "b"], ["a"], max_loras=1, total_rank=8, max_num_seqs=max_num_seqs)
    # It is passed by 64 times, waits for those that run (5 steps) and runs itself (5 steps).
    assert ended["b1"] <= 64 * max(5 / max_num_seqs, 1) * 1.5 + 12


def test_small_adapters_do_not_starve_a_large_one() -> None:
    ended = run(["a", "b", "e"], ["a", "b", "f"], max_loras=3, total_rank=5, max_num_seqs=4)
    assert ended["e2"] <= 64 * 2 + 12


def test_more_adapters_than_places_all_end() -> None:
    ended = run(["a", "b", "c", "d", "e", "f"] * 4, [], max_loras=2, total_rank=9, max_num_seqs=8)
    assert max(ended.values()) <= 4 * 6 * 5 + 10
