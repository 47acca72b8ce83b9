"""LoraGraphs: the compiled graph and the residency that follow what is registered.

A graph holds the linears that some adapter targets. When another adapter needs more, another graph is compiled in the
caller's thread, and the engine goes over to it between two steps. Knows no files and no aliases.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace

from ovms_lora.adapters.store import Registered
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.errors import AdapterError, AdapterErrorCode
from ovms_lora.engine.device import device_error
from ovms_lora.engine.engine import Engine
from ovms_lora.engine.graph_source import CompiledGraph, GraphSource, LoraTargets
from ovms_lora.engine.residency import LoraResidency
from ovms_lora.engine.runner import OpenVinoRunner

log = logging.getLogger(__name__)

# The widths that a tile may have: the device's matrix kernels work in steps of 16.
_TILE_WIDTHS = (16, 32, 64, 128, 256)


class LoraGraphs:
    """One base's graphs. Calls that may compile take seconds; only one thread at a time may make them."""

    def __init__(self, source: GraphSource, options: LoraOptions, dtype: str) -> None:
        self._source, self._options = source, options
        self._targets = LoraTargets(frozenset(), _TILE_WIDTHS[0], dtype, sums=False)
        self._largest_rank = 0  # ever: requests may still use what has no alias any more
        self._engine: Engine | None = None
        self._runner: OpenVinoRunner | None = None
        self._residency: LoraResidency | None = None

    @property
    def residency(self) -> LoraResidency:
        """Which adapters are in the graph; there is one once the first graph is compiled."""
        assert self._residency, "compiled before anything is asked for"
        return self._residency

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the adapters in the graph."""
        return self._residency.resident if self._residency else ()

    @property
    def brought_in(self) -> int:
        """How often an adapter was written into the graph because a request had need of it."""
        return self._residency.brought_in if self._residency else 0

    def compile(self, entries: Collection[Registered], *, sums: bool) -> CompiledGraph | None:
        """Compile the first graph for these adapters; None where none of them is there to need one.

        `sums` says that requests may use several adapters at once.
        """
        self._targets = self._wanted(entries, sums=sums)
        graph = self._source.compile(self._targets) if self._targets.paths else None
        rank = self._needed_rank(entries)
        self._residency = LoraResidency(
            graph.tiles if graph else None, total_rank=rank, max_loras=self._options.max_loras
        )
        self.name(entries)
        return graph

    def attach(self, engine: Engine, runner: OpenVinoRunner) -> None:
        """Name the engine whose graph is to follow what is loaded from now on."""
        self._engine, self._runner = engine, runner

    def check_rank(self, rank: int) -> None:
        """Raise AdapterError when an adapter of this rank can never be resident."""
        if self._options.total_rank != "auto" and rank > self._options.total_rank:
            raise AdapterError(
                AdapterErrorCode.RANK, f"LoRA rank {rank} is greater than total_rank {self._options.total_rank}."
            )

    def covers(self, entry: Registered) -> bool:
        """Whether the present graph has all that the adapter needs."""
        targets = self._targets
        fits = entry.max_rank <= self.residency.total_rank and (targets.sums or entry.max_rank <= targets.width)
        return targets.paths >= entry.paths and fits

    def cover(self, entries: Collection[Registered], *, sums: bool = False) -> None:
        """See that the graph has all that these adapters need, and the residency room for their ranks."""
        if self._residency:
            # The engine thread only reads it, and more room than a moment ago harms nobody.
            self._residency.total_rank = max(self._residency.total_rank, self._needed_rank(entries))
        self._switch(self._wanted(entries, sums=sums))

    def allow_sums(self) -> None:
        """See that requests may use several adapters at once."""
        self._switch(replace(self._targets, sums=True))

    def name(self, entries: Iterable[Registered]) -> None:
        """Tell the residency which adapters have an alias, and which of them stay."""
        if self._residency:
            named = list(entries)
            self._residency.name({entry.digest for entry in named})
            self._residency.pin({entry.digest for entry in named if entry.pinned})

    def sweep(self) -> None:
        """Free the tiles of adapters that no alias names any more, as far as they are idle."""
        if self._engine and self._residency:
            self._engine.call(self._residency.sweep)

    def _needed_rank(self, entries: Iterable[Registered]) -> int:
        if self._options.total_rank != "auto":
            return self._options.total_rank
        ranks = {entry.digest: entry.max_rank for entry in entries}
        return sum(sorted(ranks.values(), reverse=True)[: self._options.max_loras])

    def _wanted(self, entries: Collection[Registered], *, sums: bool) -> LoraTargets:
        """Return what a graph needs for these adapters, and for all that the present one was made for."""
        targets, ranks = self._targets, {entry.digest: entry.max_rank for entry in entries}
        paths = targets.paths.union(*(entry.paths for entry in entries))
        if self._options.linears == "all":
            paths |= self._source.linears.shapes.keys()
        width = targets.width if paths == targets.paths else _tile_width(ranks.values())
        self._largest_rank = max(self._largest_rank, *ranks.values(), 0)
        return LoraTargets(paths, width, targets.dtype, targets.sums or sums or self._largest_rank > width)

    def _switch(self, targets: LoraTargets) -> None:
        if targets == self._targets or self._engine is None:
            return
        if not targets.paths:
            self._targets = targets  # to be compiled with the first adapter
            return
        log.info("compiling a graph for %d linears", len(targets.paths))
        graph = self._source.compile(targets)
        try:
            self._engine.call(lambda: self._adopt(graph, targets))
        except (RuntimeError, MemoryError) as error:
            raise device_error(error, "the graph of the adapters") from error

    def _adopt(self, graph: CompiledGraph, targets: LoraTargets) -> None:
        assert self._runner and graph.tiles, "attached, and compiled with states"
        self.residency.move(graph.tiles)  # first: it may find no memory, and then leaves all as it is
        self._runner.adopt(graph, keep_plain=self._source.affords_plain)
        self._targets = targets


def _tile_width(ranks: Iterable[int]) -> int:
    """Return the width at which adapters of these ranks take least memory; of equal ones the widest, for few tiles."""
    known = tuple(ranks)
    if not known:
        return _TILE_WIDTHS[0]
    return min(_TILE_WIDTHS, key=lambda width: (sum(-(-rank // width) * width for rank in known), -width))
