"""LoraRuntime: the runtime adapters of one served base, from aliases to strengths in a request.

Joins the store (aliases, host memory), the engine's residency (rank rows) and the graph, which it has compiled anew in
the background when an adapter needs linears or rank rows that the present one lacks. Loading happens in the caller's
thread; only the switch to another graph happens between two steps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.adapters.store import AdapterStore, Registered
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.errors import (
    AdapterError,
    AdapterErrorCode,
    AdapterExistsError,
    AdapterUnavailableError,
    ConfigError,
    InvalidFieldError,
    ModelNotFoundError,
    OvmsLoraError,
    UnknownAliasError,
)
from ovms_lora.core.names import check_alias
from ovms_lora.core.request import AdapterUse
from ovms_lora.engine.adapter_templates import AdapterTemplates
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.engine import Engine
from ovms_lora.engine.lora_states import host_dtype
from ovms_lora.engine.residency import LoraResidency
from ovms_lora.engine.runner import CompiledGraph, GraphSource, LoraTargets, OpenVinoRunner

log = logging.getLogger(__name__)

_RANK_STEP = 16  # the device's matrix kernels work in steps of this width


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter as it is wanted: `alpha` multiplies its own PEFT scaling; a pinned one stays resident."""

    alias: str
    folder: Path
    alpha: float = 1.0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class CompositeSpec:
    """A weighted sum of adapters under one alias; a strength of None is the adapter's own `alpha`."""

    alias: str
    components: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """All that config.json or the command line says of one base's runtime adapters."""

    options: LoraOptions = field(default_factory=LoraOptions)
    adapters: tuple[AdapterSpec, ...] = ()
    composites: tuple[CompositeSpec, ...] = ()
    loading_path: Path | None = None


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What is shown of an adapter or, with `components`, of a composite."""

    alias: str
    root: str
    digest: str = ""
    rank: int = 0
    pinned: bool = False
    resident: bool = False
    components: tuple[str, ...] = ()


class LoraRuntime:
    """Thread-safe. Methods that read files or compile block for that long, and are not for an event loop."""

    def __init__(self, graphs: GraphSource, config: LoraConfig) -> None:
        options = config.options
        self._graphs = graphs
        self._options = options
        self._loading_path = config.loading_path
        self._dtype = graphs.inference_dtype if options.lora_dtype == "auto" else options.lora_dtype
        self.store = AdapterStore(
            graphs.linears,
            max_lora_rank=options.max_lora_rank,
            max_cpu_loras=options.max_cpu_loras,
            dtype=host_dtype(self._dtype),
        )
        self._templates = AdapterTemplates()
        self._composites: dict[str, CompositeSpec] = {}
        self._failures: dict[str, OvmsLoraError] = {}
        self._changing = threading.RLock()
        self._targets = LoraTargets(frozenset(), 0, self._dtype)
        self._engine: Engine | None = None
        self._runner: OpenVinoRunner | None = None
        self.residency: LoraResidency | None = None
        self._register_all(config)

    @property
    def failures(self) -> Mapping[str, OvmsLoraError]:
        """The configured adapters that could not be loaded at start, by alias."""
        return MappingProxyType(self._failures)

    @property
    def dtype(self) -> str:
        """The type of the states: "f32" or "bf16"."""
        return self._dtype

    def compile(self) -> CompiledGraph:
        """Compile the first graph, for the adapters that are registered by now."""
        registered = self.store.registered.values()
        rank = self._needed_rank(entry.max_rank for entry in registered)
        paths = frozenset().union(*(entry.paths for entry in registered))
        self._targets = LoraTargets(paths, rank, self._dtype)
        graph = self._graphs.compile(self._targets)
        self.residency = LoraResidency(graph.states, total_rank=rank, max_loras=self._options.max_loras)
        self._pin()
        return graph

    def attach(self, engine: Engine, runner: OpenVinoRunner) -> None:
        """Name the engine whose graph is to follow what is loaded from now on."""
        self._engine, self._runner = engine, runner

    def cards(self) -> tuple[AdapterCard, ...]:
        """Return what is loaded now: adapters, then composites."""
        resident = set(self.residency.resident) if self.residency else set()
        adapters = [
            AdapterCard(e.alias, str(e.folder), e.digest, e.max_rank, e.pinned, e.digest in resident)
            for e in self.store.registered.values()
        ]
        composites = [
            AdapterCard(c.alias, c.alias, components=tuple(alias for alias, _ in c.components))
            for c in dict(self._composites).values()
        ]
        return (*adapters, *composites)

    def has(self, name: str) -> bool:
        """Whether an adapter or composite is loaded under this name; does no I/O."""
        return name in self.store.registered or name in self._composites

    def findable(self, name: str) -> bool:
        """Whether the loading path holds an adapter folder of this name."""
        return self._found(name) is not None

    def load(self, spec: AdapterSpec, *, replace: bool = False) -> None:
        """Load an adapter under its alias.

        Raises AdapterExistsError when the alias is taken and `replace` is off, AdapterError, AdapterNotFoundError, or
        ConfigError for an alias that is not allowed.
        """
        check_alias(spec.alias)
        with self._changing:
            if spec.alias in self._composites or (spec.alias in self.store.registered and not replace):
                raise AdapterExistsError(
                    f"The lora adapter '{spec.alias}' has already been loaded. "
                    "If you want to load the adapter in place, set 'load_inplace' to True."
                )
            before = self.store.registered.get(spec.alias)
            adapter = self._read(spec.folder)
            self._cover(adapter)
            self.store.register(spec.alias, spec.folder, adapter, alpha=spec.alpha, pinned=spec.pinned)
            self._pin()
            if before and before.digest != adapter.digest:
                self._sweep()

    def unload(self, alias: str) -> None:
        """Take an adapter away; requests that use it run to their end with it.

        Raises UnknownAliasError, or ConfigError when a composite is made of it.
        """
        with self._changing:
            for composite in self._composites.values():
                if alias in (component for component, _ in composite.components):
                    raise ConfigError(f"adapter {alias!r} is part of composite {composite.alias!r}")
            self.store.remove(alias)
            self._pin()
            self._sweep()

    def apply(self, config: LoraConfig) -> None:
        """Make adapters and composites what `config` says; adapters that it does not name are removed.

        All of it is read and checked before anything changes. Raises AdapterError, AdapterNotFoundError or ConfigError.
        """
        with self._changing:
            read = {spec.alias: self._read(spec.folder) for spec in config.adapters}
            for adapter in read.values():
                self._cover(adapter)
            before = self.store.registered
            self._composites = {composite.alias: composite for composite in config.composites}
            for spec in config.adapters:
                self.store.register(spec.alias, spec.folder, read[spec.alias], alpha=spec.alpha, pinned=spec.pinned)
            for alias in before.keys() - read.keys():
                self.store.remove(alias)
            self._failures.clear()
            self._pin()
            self._sweep()

    def select(self, name: str, strengths: Mapping[str, float] | None = None) -> tuple[AdapterUse, ...]:
        """Return what an adapter's or composite's name stands for, with strengths overridden by alias.

        Loads from the loading path, or back into host memory, where needed. Raises ModelNotFoundError,
        AdapterUnavailableError, or InvalidFieldError for a strength that does not belong.
        """
        strengths = strengths or {}
        composite = self._composites.get(name)
        if composite is None:
            for key in strengths:
                if key != name:
                    raise InvalidFieldError(
                        f"lora_alphas key '{key}' not allowed when targeting adapter '{name}'", param="lora_alphas"
                    )
            return self.blend([(name, strengths.get(name))])
        components = dict(composite.components)
        for key in strengths:
            if key not in components:
                raise InvalidFieldError(
                    f"lora_alphas key '{key}' is not part of composite '{name}'", param="lora_alphas"
                )
        return self.blend([(alias, strengths.get(alias, alpha)) for alias, alpha in composite.components])

    def blend(self, parts: Sequence[tuple[str, float | None]]) -> tuple[AdapterUse, ...]:
        """Return adapters by alias with strengths; None is the adapter's own. Raises as `select` does."""
        uses = []
        for alias, alpha in parts:
            entry, adapter = self._get(alias)
            uses.append(AdapterUse(adapter, entry.alpha if alpha is None else alpha))
        self._check_fits(uses)
        return tuple(uses)

    def chat_template(self, uses: Sequence[AdapterUse]) -> ChatTemplate | None:
        """Return the chat template that comes with the adapters of a request: that of a single one, if it has one.

        Raises AdapterUnavailableError for one that is no template.
        """
        if len(uses) != 1:
            return None
        try:
            return self._templates.of(uses[0].adapter)
        except AdapterError as error:
            raise AdapterUnavailableError(error) from error

    def _read(self, folder: Path) -> Adapter:
        adapter = self.store.read(folder)
        self._templates.of(adapter)
        return adapter

    def _register_all(self, config: LoraConfig) -> None:
        for spec in config.adapters:
            try:
                adapter = self._read(spec.folder)
            except OvmsLoraError as error:
                self._failures[spec.alias] = error
                log.error("adapter %s cannot be loaded: %s", spec.alias, error.message)
                continue
            self.store.register(spec.alias, spec.folder, adapter, alpha=spec.alpha, pinned=spec.pinned)
        self._composites = {composite.alias: composite for composite in config.composites}

    def _get(self, alias: str) -> tuple[Registered, Adapter]:
        try:
            try:
                return self._in_host(alias)
            except UnknownAliasError:
                if not self.findable(alias):
                    raise
            with self._changing:
                folder = self._found(alias)
                if alias not in self.store.registered and folder:
                    self.load(AdapterSpec(alias, folder))
            return self._in_host(alias)
        except UnknownAliasError as error:
            raise ModelNotFoundError(alias) from error
        except AdapterError as error:
            raise AdapterUnavailableError(error) from error

    def _in_host(self, alias: str) -> tuple[Registered, Adapter]:
        """Get an adapter from the store; one that has changed in its folder may need another graph."""
        before = self.store.registered.get(alias)
        entry, adapter = self.store.get(alias)
        self._templates.of(adapter)
        same = before is not None and before.digest == entry.digest
        if not (same and self._targets.paths >= adapter.layers.keys()):
            with self._changing:
                self._cover(adapter)
                self._pin()
                self._sweep()
        return entry, adapter

    def _found(self, name: str) -> Path | None:
        if self._loading_path is None:
            return None
        try:
            check_alias(name)
        except ConfigError:
            return None
        folder = self._loading_path / name
        return folder if (folder / "adapter_config.json").is_file() else None

    def _check_fits(self, uses: Sequence[AdapterUse]) -> None:
        """Refuse a blend that could never be resident, whatever else leaves."""
        pinned = {e.digest: e.max_rank for e in self.store.registered.values() if e.pinned}
        together = pinned | {use.digest: use.adapter.max_rank for use in uses}
        if len(together) > self._options.max_loras:
            message = (
                f"{len(together)} adapters at once (pinned ones included) exceed max_loras {self._options.max_loras}"
            )
            raise InvalidFieldError(message, param="lora")
        if sum(together.values()) > self._targets.total_rank:
            message = f"rank {sum(together.values())} in one request exceeds the total rank {self._targets.total_rank}"
            raise InvalidFieldError(message, param="lora")

    def _needed_rank(self, ranks: Iterable[int]) -> int:
        if self._options.total_rank != "auto":
            return self._options.total_rank
        largest = sorted(ranks, reverse=True)[: self._options.max_loras]
        return -(-sum(largest) // _RANK_STEP) * _RANK_STEP

    def _cover(self, adapter: Adapter) -> None:
        """See that the graph has the adapter's linears and enough rank rows; compile another one if not."""
        if self._options.total_rank != "auto" and adapter.max_rank > self._options.total_rank:
            raise AdapterError(
                AdapterErrorCode.RANK,
                f"LoRA rank {adapter.max_rank} is greater than total_rank {self._options.total_rank}.",
            )
        ranks = {entry.digest: entry.max_rank for entry in self.store.registered.values()}
        ranks[adapter.digest] = adapter.max_rank
        wanted = LoraTargets(
            self._targets.paths | adapter.layers.keys(),
            max(self._targets.total_rank, self._needed_rank(ranks.values())),
            self._dtype,
        )
        if wanted == self._targets or self._engine is None:
            return
        log.info("compiling a graph for %d linears, total rank %d", len(wanted.paths), wanted.total_rank)
        graph = self._graphs.compile(wanted)
        self._engine.call(lambda: self._adopt(graph, wanted))

    def _adopt(self, graph: CompiledGraph, targets: LoraTargets) -> None:
        assert self._runner and self.residency and graph.states, "attached, and compiled with states"
        self._runner.adopt(graph)
        self.residency.move(graph.states, targets.total_rank)
        self._targets = targets

    def _pin(self) -> None:
        """Tell the residency which adapters have an alias, and which of them stay."""
        registered = self.store.registered.values()
        if self.residency:
            self.residency.name({entry.digest for entry in registered})
            self.residency.pin({entry.digest for entry in registered if entry.pinned})

    def _sweep(self) -> None:
        """Free the rank rows of adapters that no alias names any more, as far as they are idle."""
        if self._engine and self.residency:
            self._engine.call(self.residency.sweep)
