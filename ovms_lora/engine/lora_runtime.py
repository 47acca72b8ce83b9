"""LoraRuntime: the runtime adapters of one served base, from aliases to strengths in a request.

Joins the store (aliases, host memory) and the graphs with their residency. Loading happens in the caller's thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.adapters.bucket_source import StoredAdapter
from ovms_lora.adapters.sources import AdapterPlace
from ovms_lora.adapters.store import AdapterStore, Registered
from ovms_lora.core.errors import (
    AdapterError,
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
from ovms_lora.engine.graph_source import CompiledGraph, GraphSource
from ovms_lora.engine.loading_path import LoadingPath, open_loading_path
from ovms_lora.engine.lora_config import AdapterCard, AdapterSpec, CompositeSpec, LoraConfig
from ovms_lora.engine.lora_graphs import LoraGraphs
from ovms_lora.engine.lora_states import host_dtype

log = logging.getLogger(__name__)


class LoraRuntime:
    """Thread-safe. Methods that read files or compile block for that long, and are not for an event loop."""

    def __init__(self, source: GraphSource, config: LoraConfig) -> None:
        options = config.options
        self._options = options
        self._config = config
        self._by_clients: dict[str, AdapterSpec] = {}
        self._dtype = source.inference_dtype if options.lora_dtype == "auto" else options.lora_dtype
        self.store = AdapterStore(
            source.linears,
            max_lora_rank=options.max_lora_rank,
            max_cpu_loras=options.max_cpu_loras,
            dtype=host_dtype(self._dtype),
        )
        self._templates = AdapterTemplates()
        self._composites: dict[str, CompositeSpec] = {}
        self._failures: dict[str, OvmsLoraError] = {}
        self._changing = threading.RLock()
        self.graphs = LoraGraphs(source, options, self._dtype)
        self._register_all(config)
        self._loading_path = open_loading_path(self, config)

    @property
    def failures(self) -> Mapping[str, OvmsLoraError]:
        """The configured adapters that could not be loaded at start, by alias."""
        return MappingProxyType(self._failures)

    @property
    def by_clients(self) -> tuple[AdapterSpec, ...]:
        """The adapters that `load` has brought and nothing has removed: no configuration names them so."""
        return tuple(self._by_clients.values())

    @property
    def loading_path(self) -> LoadingPath | None:
        """Where adapters are found that nobody has configured."""
        return self._loading_path

    @property
    def dtype(self) -> str:
        """The type of the states: "f32" or "bf16"."""
        return self._dtype

    def compile(self) -> CompiledGraph | None:
        """Compile the first graph for the adapters that are registered by now; None where none needs one."""
        return self.graphs.compile(self.store.registered.values(), sums=bool(self._composites))

    def cards(self) -> tuple[AdapterCard, ...]:
        """Return what is loaded now: adapters, then composites."""
        resident = set(self.graphs.resident)
        adapters = [
            AdapterCard(e.alias, str(e.folder), e.digest, e.max_rank, e.pinned, e.digest in resident)
            for e in self.store.registered.values()
        ]
        composites = [
            AdapterCard(c.alias, c.alias, components=tuple(alias for alias, _ in c.components))
            for c in dict(self._composites).values()
        ]
        return (*adapters, *composites)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names for which nothing has to be brought into the graph: of adapters, and of composites of such."""
        digests = set(self.graphs.resident)
        names = {entry.alias for entry in tuple(self.store.registered.values()) if entry.digest in digests}
        whole = [
            c.alias for c in dict(self._composites).values() if names.issuperset(alias for alias, _ in c.components)
        ]
        return (*names, *whole)

    def has(self, name: str) -> bool:
        """Whether an adapter or composite is loaded under this name; does no I/O."""
        return name in self.store.registered or name in self._composites

    def load(self, spec: AdapterSpec, *, replace: bool = False) -> None:
        """Load an adapter under its alias.

        Raises AdapterExistsError when the alias is taken and `replace` is off, AdapterError, AdapterNotFoundError, or
        ConfigError for an alias that is not allowed.
        """
        with self._changing:
            self._add(spec.alias, spec.folder, alpha=spec.alpha, pinned=spec.pinned, replace=replace)
            self._by_clients[spec.alias] = spec

    def take(self, path: LoadingPath, alias: str, place: AdapterPlace, *, replace: bool = False) -> None:
        """Load an adapter of the loading path, in place of an earlier version with `replace`; others stay.

        Raises what `load` does.
        """
        with self._changing:
            before = self.store.registered.get(alias)
            is_earlier = before is not None and isinstance(before.folder, StoredAdapter) and replace
            if path is self._loading_path and (is_earlier or not self.has(alias)):
                self._add(alias, place, replace=is_earlier)

    def let_go(self, path: LoadingPath, place: AdapterPlace) -> None:
        """Unload the adapter of the loading path that lies there; requests that use it run to their end with it."""
        with self._changing:
            for entry in self.store.registered.values() if path is self._loading_path else ():
                if entry.folder == place:
                    self.store.remove(entry.alias)
            self._follow()

    def _add(
        self, alias: str, place: AdapterPlace, *, alpha: float = 1.0, pinned: bool = False, replace: bool = False
    ) -> None:
        check_alias(alias)
        with self._changing:
            if alias in self._composites or (alias in self.store.registered and not replace):
                raise AdapterExistsError(
                    f"The lora adapter '{alias}' has already been loaded. "
                    "If you want to load the adapter in place, set 'load_inplace' to True."
                )
            before = self.store.registered.get(alias)
            with self._reading():
                entry = self._read(alias, place, alpha=alpha, pinned=pinned)
                self.graphs.cover([*self.store.registered.values(), entry])
                self.store.register(entry)
            self._failures.pop(alias, None)
            self._follow(sweep=before is not None and before.digest != entry.digest)

    def unload(self, alias: str) -> None:
        """Take an adapter away; requests that use it run to their end with it.

        Raises UnknownAliasError, or ConfigError when a composite is made of it.
        """
        with self._changing:
            for composite in self._composites.values():
                if alias in (component for component, _ in composite.components):
                    raise ConfigError(
                        f"adapter {alias!r} is part of composite {composite.alias!r}", hint="remove that first"
                    )
            self.store.remove(alias)
            self._by_clients.pop(alias, None)
            self._failures.pop(alias, None)
            self._follow()

    def apply(self, config: LoraConfig) -> None:
        """Make the configured adapters and composites what `config` says.

        What clients have loaded stays, but where the configuration of the same alias has changed. All is read and
        checked before anything changes. Raises AdapterError, AdapterNotFoundError or ConfigError.
        """
        with self._changing:
            loaded = self._untouched_by(config)
            path = self._loading_path if config.finds_as(self._config) else open_loading_path(self, config)
            with self._reading():
                entries = [self._read_named(spec) for spec in config.adapters if spec.alias not in loaded]
                self.graphs.cover([*self.store.registered.values(), *entries], sums=bool(config.composites))
                for entry in entries:
                    self.store.register(entry)
            kept = {entry.alias for entry in entries} | loaded.keys()
            if path is self._loading_path:
                kept |= self._found_on_path()
            # In this order: at no time does a composite that can be asked for lack an adapter.
            self._composites = {composite.alias: composite for composite in config.composites}
            for alias in self.store.registered.keys() - kept:
                self.store.remove(alias)
            self._config, self._by_clients, self._loading_path = config, loaded, path
            self._failures.clear()
            self._follow()

    def _read_named(self, spec: AdapterSpec) -> Registered:
        try:
            return self._read(spec.alias, spec.folder, alpha=spec.alpha, pinned=spec.pinned)
        except AdapterError as error:
            raise AdapterError(error.code, f"adapter {spec.alias!r}: {error.message}", hint=error.hint) from error

    def _untouched_by(self, config: LoraConfig) -> dict[str, AdapterSpec]:
        """Return what clients have loaded and another configuration leaves alone. Raises ConfigError."""
        before, after = ({spec.alias: spec for spec in each.adapters} for each in (self._config, config))
        loaded = {alias: spec for alias, spec in self._by_clients.items() if before.get(alias) == after.get(alias)}
        for composite in config.composites:
            if composite.alias in loaded:
                raise ConfigError(
                    f"the name {composite.alias!r} is that of an adapter that is loaded", hint="unload it first"
                )
        return loaded

    def _found_on_path(self) -> set[str]:
        configured = {spec.alias for spec in self._config.adapters}
        return self.store.registered.keys() - configured - self._by_clients.keys()

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
        if len({use.digest for use in uses}) > 1:
            with self._changing:
                self.graphs.allow_sums()
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

    def _register_all(self, config: LoraConfig) -> None:
        for spec in config.adapters:
            try:
                with self._reading():
                    entry = self._read(spec.alias, spec.folder, alpha=spec.alpha, pinned=spec.pinned)
                    self.store.register(entry)
            except OvmsLoraError as error:
                # Its traceback, and that of what caused it, would keep the tensors that were read.
                error.__cause__ = error.__context__ = None
                self._failures[spec.alias] = error.with_traceback(None)
                log.error("adapter %s cannot be loaded: %s", spec.alias, error.message)
        self._composites = {composite.alias: composite for composite in config.composites}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep in host memory what has an alias at the end; a failure within leaves nothing behind."""
        try:
            yield
        finally:
            self.store.drop_unnamed()

    def _read(self, alias: str, place: AdapterPlace, *, alpha: float, pinned: bool) -> Registered:
        """Read and check an adapter. Its tensors are left to the store, which keeps as many as it may."""
        adapter = self.store.read(place)
        self._templates.of(adapter)
        self.graphs.check_rank(adapter.max_rank)
        return Registered.of(alias, place, adapter, alpha=alpha, pinned=pinned)

    def _get(self, alias: str) -> tuple[Registered, Adapter]:
        try:
            if self._loading_path is not None:
                self._loading_path.bring(alias)
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
        self.graphs.check_rank(entry.max_rank)
        if before is None or before.digest != entry.digest or not self.graphs.covers(entry):
            with self._changing:
                self.graphs.cover(self.store.registered.values())
                self._follow()
        return entry, adapter

    def _check_fits(self, uses: Sequence[AdapterUse]) -> None:
        """Refuse a blend that could never be resident, whatever else leaves."""
        pinned = {e.digest: e.max_rank for e in self.store.registered.values() if e.pinned}
        together = pinned | {use.digest: use.adapter.max_rank for use in uses}
        if len(together) > self._options.max_loras:
            message = (
                f"{len(together)} adapters at once (pinned ones included) exceed max_loras {self._options.max_loras}"
            )
            raise InvalidFieldError(message, param="lora")
        rank, total_rank = sum(together.values()), self.graphs.residency.total_rank
        if rank > total_rank:
            raise InvalidFieldError(f"rank {rank} in one request exceeds the total rank {total_rank}", param="lora")

    def _follow(self, *, sweep: bool = True) -> None:
        """Tell the residency what has an alias now; with `sweep` it gives up what has none."""
        self.graphs.name(self.store.registered.values())
        if sweep:
            self.graphs.sweep()
