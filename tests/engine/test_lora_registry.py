"""Adapters come, change and go while requests run: a random walk over one model's runtime, with a device that is fake.

A graph compiles at once here and a folder is a word, so thousands of orders can be tried. Scheduler, residency, store
and runtime are the real ones. How each of them behaves alone is said elsewhere.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ovms_lora.adapters import store as store_module
from ovms_lora.adapters.adapter import Adapter, LoraPair
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.errors import (
    AdapterError,
    AdapterErrorCode,
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
    InvalidFieldError,
    ModelNotFoundError,
    OvmsLoraError,
    UnknownAliasError,
)
from ovms_lora.core.request import AdapterUse, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine import lora_graphs
from ovms_lora.engine.engine import Engine
from ovms_lora.engine.graph_source import CompiledGraph, GraphSource, LoraTargets
from ovms_lora.engine.lora_config import AdapterSpec, CompositeSpec, LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.lora_states import TileIndices
from ovms_lora.engine.runner import OpenVinoRunner
from ovms_lora.engine.scheduler import Chunk, SchedulerLimits
from ovms_lora.engine.sequence import Sequence as EngineSequence
from tests.adapters.adapter_files import tiny_base
from tests.engine.fake_tiles import FakeTiles
from tests.engine.stepping import MoodyResidency, Stepper, run_alone

T = TypeVar("T")
# What may lie in a folder: the adapter's digest, and its ranks by layer.
CONTENTS: Mapping[str, Mapping[str, int]] = {
    "one": {"q": 1},
    "two": {"q": 2, "v": 1},
    "three": {"v": 3},
    "four": {"o": 4, "q": 1},
    "other two": {"o": 2},
    "five": {"q": 5, "v": 5, "o": 5},
}
NOTHING, BAD = "nothing", "bad"
ALIASES = ("a", "b", "c")
FOUND = ("x", "y")  # aliases that only the loading path knows
COMPOSITES = ("m", "n")
STRENGTHS = st.none() | st.sampled_from([-1.5, 0.5, 2.0])
CONTENT = st.sampled_from([*CONTENTS, *CONTENTS, NOTHING, BAD])


def adapter(digest: str) -> Adapter:
    def pair(rank: int) -> LoraPair:
        return LoraPair(np.zeros((rank, 1), np.float32), np.zeros((1, rank), np.float32), 1.0)

    layers = {path: pair(rank) for path, rank in CONTENTS[digest].items()}
    return Adapter(digest, None, layers, np.dtype(np.float32))  # type: ignore[arg-type]  # no configuration


def rank_of(digest: str) -> int:
    return max(CONTENTS[digest].values())


class FakeStates(FakeTiles):
    """Tiles that take the layers that they were compiled for."""

    def __init__(self, targets: LoraTargets) -> None:
        super().__init__(targets.width)
        self.paths, self.sums = targets.paths, targets.sums

    def write(self, tiles: TileIndices, adapter: Adapter) -> None:
        assert adapter.layers.keys() <= self.paths, "the graph lacks a layer of an adapter"
        super().write(tiles, adapter)


class FakeDevice:
    """Compiles, adopts a graph, and does between two steps what it is told: GraphSource, runner and engine in one."""

    inference_dtype = "f32"
    affords_plain = True
    linears = tiny_base()

    def __init__(self) -> None:
        self.states: FakeStates | None = None
        self.compiled = 0

    def compile(self, targets: LoraTargets) -> CompiledGraph:
        self.compiled += 1
        states = FakeStates(targets) if targets.paths else None
        return CompiledGraph(cast(Any, None), cast(Any, states), 257)

    def adopt(self, graph: CompiledGraph, *, keep_plain: bool) -> None:
        assert keep_plain == self.affords_plain
        self.states = cast("FakeStates | None", graph.tiles)

    def call(self, work: Callable[[], T]) -> T:
        return work()


class Watched(MoodyResidency):
    """The runtime's residency, with a list of who holds adapters."""

    def __init__(self, runtime: LoraRuntime) -> None:
        super().__init__()
        self.runtime = runtime

    def acquire(self, sequence: EngineSequence) -> bool:
        if not self.runtime.graphs.residency.acquire(sequence):
            return False
        self.held.append(sequence)
        return True

    def release(self, sequence: EngineSequence) -> None:
        self.runtime.graphs.residency.release(sequence)
        self.held.remove(sequence)


@dataclass
class Known:
    """What an alias has to stand for."""

    folder: Path
    digest: str
    alpha: float
    pinned: bool


def raised_by(call: Callable[[], object]) -> type[OvmsLoraError] | None:
    """The class only: an error that is kept keeps the frames that it went through, and their adapters."""
    try:
        call()
    except OvmsLoraError as error:
        return type(error)
    return None


class RegistryMachine(RuleBasedStateMachine):
    """Random loads, changes, configurations and requests beside a model of what is right."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.content: dict[Path, str] = {self.place / name: name for name in CONTENTS}
        self.known: dict[str, Known] = {}
        self.composites: dict[str, dict[str, float | None]] = {}
        self.seen: list[tuple[str, weakref.ref[Adapter]]] = []
        self.live: list[EngineSequence] = []
        self.names = itertools.count()
        self.patches = (
            mock.patch.object(store_module, "load_adapter", self.read),
            mock.patch.object(lora_graphs, "_TILE_WIDTHS", (1, 2, 4)),  # so that ranks are above and below
        )
        for patch in self.patches:
            patch.start()

    def read(self, folder: Path, *_: Any, **__: Any) -> Adapter:
        match self.content.get(folder, NOTHING):
            case "nothing":
                raise AdapterNotFoundError(str(folder))
            case "bad":
                raise AdapterError(AdapterErrorCode.TRUNCATED, "cut off")
            case digest:
                made = adapter(digest)
                self.seen.append((digest, weakref.ref(made)))
                return made

    @initialize(
        max_loras=st.integers(1, 3),
        total_rank=st.sampled_from(["auto", "auto", "auto", 5, 12]),
        max_cpu_loras=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        first=st.dictionaries(st.sampled_from(ALIASES), st.sampled_from(list(CONTENTS))),
    )
    def start(
        self, max_loras: int, total_rank: Any, max_cpu_loras: int, max_num_seqs: int, first: dict[str, str]
    ) -> None:
        self.options = LoraOptions(max_loras=max_loras, total_rank=total_rank, max_cpu_loras=max_cpu_loras)
        self.device = FakeDevice()
        specs = [AdapterSpec(alias, self.place / content) for alias, content in first.items()]
        config = LoraConfig(self.options, tuple(specs), loading_path=self.place)
        self.configured, self.by_clients = {spec.alias: spec for spec in specs}, dict[str, AdapterSpec]()
        self.runtime = LoraRuntime(cast(GraphSource, self.device), config)
        if graph := self.runtime.compile():
            self.device.adopt(graph, keep_plain=True)
        self.runtime.graphs.attach(cast(Engine, self.device), cast(OpenVinoRunner, self.device))
        good = [spec for spec in specs if self.rank_allowed(self.content[spec.folder])]
        self.known = {spec.alias: self.as_known(spec) for spec in good}
        assert self.runtime.failures.keys() == first.keys() - self.known.keys()
        limits = SchedulerLimits(max_num_seqs=max_num_seqs, max_num_batched_tokens=12, max_bypasses=3)
        watched = Watched(self.runtime)
        self.stepper = Stepper(
            limits, num_blocks=32, block_size=4, residency=watched, before_step=self.tiles_hold_what_was_selected
        )

    # ── what is right ──

    def as_known(self, spec: AdapterSpec) -> Known:
        return Known(spec.folder, self.content[spec.folder], spec.alpha, spec.pinned)

    def rank_allowed(self, digest: str) -> bool:
        total = self.options.total_rank
        return total == "auto" or rank_of(digest) <= total

    def refusal(self, folder: Path) -> type[OvmsLoraError] | None:
        """How a folder is refused now; None if it is not."""
        content = self.content.get(folder, NOTHING)
        if content == NOTHING:
            return AdapterNotFoundError
        return AdapterError if content == BAD or not self.rank_allowed(content) else None

    def alive(self, digest: str) -> bool:
        return any(seen == digest and made() is not None for seen, made in self.seen)

    def in_use(self) -> set[str]:
        return {use.digest for sequence in self.live for use in sequence.request.adapters}

    def fits(self, digests: set[str]) -> bool:
        """Whether these can be resident beside all pinned ones."""
        together = digests | {known.digest for known in self.known.values() if known.pinned}
        total = self.runtime.graphs.residency.total_rank
        return len(together) <= self.options.max_loras and sum(map(rank_of, together)) <= total

    def resolved(self, alias: str) -> Known | type[OvmsLoraError]:
        """What an alias has to give now; a folder is looked at only where memory has nothing."""
        known = self.known.get(alias)
        if known is None:
            folder = self.place / alias
            if not (folder / "adapter_config.json").exists():
                return ModelNotFoundError
            refused = self.refusal(folder)
            if refused:
                return AdapterUnavailableError if refused is AdapterError else refused
            self.known[alias] = known = Known(folder, self.content[folder], 1.0, False)
        elif not self.alive(known.digest):
            content = self.content.get(known.folder, NOTHING)
            if content in (NOTHING, BAD):
                return AdapterUnavailableError if content == BAD else AdapterNotFoundError
            known.digest = content
        return known if self.rank_allowed(known.digest) else AdapterUnavailableError

    # ── what may happen ──

    @rule(
        alias=st.sampled_from([*ALIASES, *ALIASES, *COMPOSITES]),
        folder=st.sampled_from(list(CONTENTS)),
        alpha=st.sampled_from([1.0, 0.25]),
        pinned=st.booleans(),
        replace=st.sampled_from([True, True, False]),
    )
    def load(self, alias: str, folder: str, alpha: float, pinned: bool, replace: bool) -> None:
        spec = AdapterSpec(alias, self.place / folder, alpha, pinned)
        taken = alias in self.composites or (alias in self.known and not replace)
        refused = AdapterExistsError if taken else self.refusal(spec.folder)
        assert raised_by(lambda: self.runtime.load(spec, replace=replace)) is refused
        if not refused:
            self.known[alias] = self.as_known(spec)
            self.by_clients[alias] = spec
            self.all_have_room()

    @rule(alias=st.sampled_from([*ALIASES, *FOUND]))
    def unload(self, alias: str) -> None:
        in_composite = any(alias in components for components in self.composites.values())
        refused = ConfigError if in_composite else None if alias in self.known else UnknownAliasError
        assert raised_by(lambda: self.runtime.unload(alias)) is refused
        if not refused:
            del self.known[alias]
            self.by_clients.pop(alias, None)

    @rule(
        wanted=st.dictionaries(
            st.sampled_from(ALIASES),
            st.tuples(st.sampled_from(list(CONTENTS)), st.sampled_from([1.0, 3.0]), st.booleans()),
        ),
        data=st.data(),
    )
    def configure(self, wanted: dict[str, tuple[str, float, bool]], data: st.DataObject) -> None:
        specs = [AdapterSpec(alias, self.place / each[0], each[1], each[2]) for alias, each in wanted.items()]
        parts = st.dictionaries(st.sampled_from(sorted(wanted)), STRENGTHS, min_size=1) if wanted else st.nothing()
        mixed = data.draw(st.dictionaries(st.sampled_from(COMPOSITES), parts)) if wanted else {}
        composites = [CompositeSpec(alias, tuple(components.items())) for alias, components in mixed.items()]
        config = LoraConfig(self.options, tuple(specs), tuple(composites), loading_path=self.place)
        before, after = self.configured, {spec.alias: spec for spec in specs}
        staying = {alias: spec for alias, spec in self.by_clients.items() if before.get(alias) == after.get(alias)}
        new = [spec for spec in specs if spec.alias not in staying]
        refused = next(filter(None, (self.refusal(spec.folder) for spec in new)), None)
        if staying.keys() & mixed.keys():
            refused = ConfigError
        compiled = self.device.compiled
        assert raised_by(lambda: self.runtime.apply(config)) is refused
        if refused:
            return
        assert self.device.compiled <= compiled + 1, "one graph for all of them"
        found = self.known.keys() - before.keys() - self.by_clients.keys()
        self.known = {alias: self.known[alias] for alias in staying.keys() | found}
        self.known |= {spec.alias: self.as_known(spec) for spec in new}
        self.configured, self.by_clients, self.composites = after, staying, mixed
        self.all_have_room()

    def all_have_room(self) -> None:
        digests = {known.digest for known in self.known.values()}
        if self.options.total_rank == "auto" and len(digests) <= self.options.max_loras:
            assert self.fits(digests), "the total rank is to be enough for all"

    @rule(folder=st.sampled_from(list(CONTENTS)), content=CONTENT)
    def change_a_folder(self, folder: str, content: str) -> None:
        self.content[self.place / folder] = content

    @rule(alias=st.sampled_from(FOUND), content=CONTENT)
    def change_the_loading_path(self, alias: str, content: str) -> None:
        folder = self.place / alias
        self.content[folder] = content
        shutil.rmtree(folder, ignore_errors=True)
        if content != NOTHING:
            folder.mkdir()
            (folder / "adapter_config.json").touch()
        assert self.runtime.loading_path
        assert self.runtime.loading_path.find(alias) == (content != NOTHING)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), count=st.integers(0, 3))
    def run_what_is_there(self, data: st.DataObject, count: int) -> None:
        self.select(data.draw(st.sampled_from(sorted(self.known.keys() | self.composites.keys()))), {})
        self.step(count)

    @rule(
        name=st.sampled_from([*ALIASES, *FOUND, *COMPOSITES]),
        strengths=st.dictionaries(st.sampled_from(ALIASES), st.sampled_from([0.5, 4.0]), max_size=1),
    )
    def ask_for_a_name(self, name: str, strengths: dict[str, float]) -> None:
        self.select(name, strengths)

    def select(self, name: str, strengths: Mapping[str, float]) -> None:
        parts = self.composites.get(name, {name: None})
        if not strengths.keys() <= parts.keys():
            assert raised_by(lambda: self.runtime.select(name, strengths)) is InvalidFieldError
            return
        self.ask([*({**parts, **strengths}).items()], lambda: self.runtime.select(name, strengths))

    @rule(parts=st.lists(st.tuples(st.sampled_from([*ALIASES, *FOUND]), STRENGTHS), max_size=3))
    def blend(self, parts: list[tuple[str, float | None]]) -> None:
        self.ask(parts, lambda: self.runtime.blend(parts))

    def ask(self, parts: Sequence[tuple[str, float | None]], choose: Callable[[], tuple[AdapterUse, ...]]) -> None:
        """Choose adapters, which has to give what `parts` stand for; start a request with them."""
        wanted: list[tuple[str, float]] = []
        expected: type[OvmsLoraError] | None = None
        uses: list[AdapterUse] = []
        # Resolved one after another by the model too: reading one may push another one out of memory.
        held: list[Adapter] = []
        for alias, alpha in parts:
            known = self.resolved(alias)
            if isinstance(known, type):
                expected = known
                break
            if len(parts) > 1:
                held += self.brought_in(alias, known.digest)
            wanted.append((known.digest, known.alpha if alpha is None else alpha))
        raised = raised_by(lambda: uses.extend(choose()))
        del held
        if expected is None and not self.fits({digest for digest, _ in wanted}):
            expected = InvalidFieldError
        assert raised is expected
        if expected is None:
            assert [(use.digest, use.alpha) for use in uses] == wanted
            sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            prompt = tuple(range(97, 97 + 1 + len(self.live) % 9))
            self.live += self.stepper.add(GenerationRequest(str(next(self.names)), prompt, sampling, tuple(uses)))

    def brought_in(self, alias: str, digest: str) -> list[Adapter]:
        """One of several adapters, which then stays in memory; none if even it alone is refused."""
        try:
            return [cast(Adapter, use.adapter) for use in self.runtime.blend([(alias, None)])]
        except InvalidFieldError:
            assert not self.fits({digest})
            return []

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            before = self.residents()
            pinned = {known.digest for known in self.known.values() if known.pinned}
            self.stepper.step()
            if all(self.fits({use.digest for use in each.request.adapters}) for each in self.live):
                assert before & pinned <= self.residents(), "a pinned one has left"
            self.forget_the_finished()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.stepper.scheduler.finish(sequence)

    # ── what has to hold ──

    def residents(self) -> set[str]:
        return set(self.runtime.graphs.residency.resident)

    def forget_the_finished(self) -> None:
        for sequence in self.stepper.finished:
            self.live.remove(sequence)
            assert sequence.output_token_ids == run_alone(sequence.request, 0), "it had another version's blocks"
        self.stepper.finished.clear()

    def tiles_hold_what_was_selected(self, chunks: Sequence[Chunk]) -> None:
        """Whatever was loaded or compiled meanwhile: a step computes a sequence's own adapters, and no others."""
        for chunk in chunks:
            sequence, left = chunk.sequence, Counter[str]()
            if not sequence.request.adapters:
                assert sequence.tiles is None
                continue
            assert sequence.tiles is not None and self.device.states is not None
            found = dict(zip(sequence.tiles.tiles.tolist(), sequence.tiles.alphas.tolist(), strict=True))
            assert len(found) == 1 or self.device.states.sums, "the graph takes one tile of a row"
            for use in sequence.request.adapters:
                left[use.digest] += use.alpha  # type: ignore[assignment]  # counts of floats
            for digest, alpha in left.items():
                tiles = [tile for tile in found if self.device.states.owner[tile] == digest]
                assert len(tiles) == -(-rank_of(digest) // self.device.states.width)
                assert {found.pop(tile) for tile in tiles} == {float(np.float32(alpha))}
            assert not found

    @invariant()
    def names_stand_for_what_was_given(self) -> None:
        if not hasattr(self, "stepper"):
            return
        found = self.runtime.store.registered
        assert {a: Known(cast(Path, e.folder), e.digest, e.alpha, e.pinned) for a, e in found.items()} == self.known
        cards = {card.alias: card for card in self.runtime.cards()}
        assert cards.keys() == self.known.keys() | self.composites.keys()
        for alias, known in self.known.items():
            card = cards[alias]
            assert (card.root, card.digest, card.pinned) == (str(known.folder), known.digest, known.pinned)
            assert card.rank == rank_of(known.digest)
            assert card.resident == (known.digest in self.residents())
        for alias, components in self.composites.items():
            assert cards[alias].components == tuple(components)

    @invariant()
    def no_rank_is_lost(self) -> None:
        if not hasattr(self, "stepper"):
            return
        residency = self.runtime.graphs.residency
        taken = sum(map(rank_of, self.residents()))
        assert residency.free_rank == residency.total_rank - taken
        holding = {use.digest for each in self.stepper.scheduler.running for use in each.request.adapters}
        assert holding <= self.residents() <= holding | {known.digest for known in self.known.values()}

    @invariant()
    def memory_holds_what_is_named_or_used(self) -> None:
        if not hasattr(self, "stepper"):
            return
        living = Counter(digest for digest, made in self.seen if made() is not None)
        assert all(count == 1 for count in living.values()), "one object for one content"
        assert living.keys() <= self.in_use() | {known.digest for known in self.known.values()}
        assert len(living.keys() - self.in_use() - self.residents()) <= self.options.max_cpu_loras
        self.seen = [each for each in self.seen if each[1]() is not None]

    def teardown(self) -> None:
        if hasattr(self, "stepper"):
            self.stepper.run_to_the_end()  # which fails when somebody starves
            self.forget_the_finished()
            assert not self.live
            self.runtime.apply(LoraConfig(self.options))
            for spec in self.runtime.by_clients:
                self.runtime.unload(spec.alias)
            self.known, self.composites = {}, {}
            self.no_rank_is_lost()
            assert not self.residents()
            gc.collect()
            assert [digest for digest, made in self.seen if made() is not None] == []
        for patch in self.patches:
            patch.stop()
        shutil.rmtree(self.place)


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=10, stateful_step_count=40, deadline=None)
