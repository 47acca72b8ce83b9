"""Lifecycle: brings the served models to what the source wants, at start, on a reload and on a change of the file.

    read ──► load new bases ──► apply adapters ──► put (adds, swaps) ──► drain and stop what was replaced or removed

At start, what can be loaded is served; a reload is taken whole or not at all. A base whose adapters alone have changed
stays as it is. Reading and loading block, so they run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from ovms_lora.core.errors import ConfigError, ModelFolderError, OvmsLoraError
from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.server.async_engine import AsyncEngine
from ovms_lora.server.early_load import LoadModel
from ovms_lora.server.fault_log import FaultLog
from ovms_lora.server.model_source import ModelSource, ModelSpec
from ovms_lora.server.options import Limits
from ovms_lora.server.registry import ModelRegistry, ModelState, ModelStatus, ServedModel

log = logging.getLogger(__name__)


class Lifecycle:
    """Keeps the registry as the source wants it. All methods run on the event loop."""

    def __init__(
        self,
        source: ModelSource,
        registry: ModelRegistry,
        load: LoadModel,
        limits: Limits,
        *,
        on_failure: Callable[[OvmsLoraError], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._registry = registry
        self._load_model = load
        self._limits = limits
        self._on_failure = on_failure
        # Held by whoever changes which names are served: one after the other, so that names stay unique.
        self.changing = asyncio.Lock()
        self._leaving: dict[asyncio.Task[None], ServedModel] = {}
        self._faults = FaultLog(log, "the configuration was not reloaded")
        self.started = False
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether requests are taken: a model is loaded and warm, and the server does not drain."""
        return self.started and not self.draining and self.live and bool(self._registry.served)

    @property
    def live(self) -> bool:
        """Whether every engine has turned its loop lately."""
        limit = self._limits.heartbeat_seconds
        return all(served.model.engine.heartbeat_age() < limit for served in self._registry.served)

    @property
    def active_calls(self) -> int:
        """How many calls are neither answered nor dropped."""
        return sum(served.engine.active_calls for served in (*self._registry.served, *self._leaving.values()))

    async def start(self) -> None:
        """Load all models; serve those that can be loaded. Reports a failure when none can."""
        failure: OvmsLoraError | None = None
        async with self.changing:
            try:
                specs = await asyncio.to_thread(self._source.read)
            except ConfigError as error:
                self._on_failure(error)
                return
            for spec in specs:
                self._registry.mark(spec.name, _status(spec, ModelState.START))
            for spec in specs:
                try:
                    self._registry.put(await self._load(spec))
                except OvmsLoraError as error:
                    failure = error
                    self._registry.mark(spec.name, _status(spec, ModelState.LOADING, error.message))
                    log.error("model %s cannot be loaded: %s", spec.name, error.message)
        if failure and not self._registry.served:
            self._on_failure(failure)
        self.started = True

    def fail(self, error: OvmsLoraError) -> None:
        """Report that the server cannot go on."""
        self._on_failure(error)

    async def reload(self) -> bool:
        """Bring the served models to what the source wants now; return whether anything has changed.

        Raises ConfigError, ModelFolderError, or what is wrong with an adapter; then nothing has changed.
        """
        async with self.changing:
            wanted = await asyncio.to_thread(self._source.read)
            self._check_names(wanted)
            running = {served.name: served for served in self._registry.served}
            changed = [spec for spec in wanted if spec.name not in running or running[spec.name].spec != spec]
            new = [spec for spec in changed if spec.name not in running or not spec.same_base(running[spec.name].spec)]
            kept = [spec for spec in changed if spec not in new]
            gone = set(self._registry.statuses) - {spec.name for spec in wanted}
            gone = {name for name in gone if self._registry.statuses[name].state is not ModelState.END}
            async with contextlib.AsyncExitStack() as undo:
                loaded = [await self._load_wholly(spec, undo) for spec in new]
                for spec in kept:
                    await self._apply(running[spec.name], spec, undo)
                undo.pop_all()
            for served in loaded:
                if replaced := self._registry.put(served):
                    self._retire(replaced)
            for spec in kept:
                self._registry.put(replace(running[spec.name], spec=spec))
            for name in gone:
                self._remove(name)
        return bool(changed or gone)

    async def poll(self) -> None:
        """Reload when the source has changed; leave one alone that is not usable, and log each of its faults once."""
        if not await asyncio.to_thread(self._source.changed):
            return
        try:
            changed = await self.reload()
        except OvmsLoraError as error:
            self._faults.report(error)
            return
        self._faults.clear()
        if changed:
            log.info("the configuration was reloaded")

    async def stop(self) -> None:
        """Stop all engines; what still runs is aborted."""
        self.draining = True
        leaving = dict(self._leaving)
        for task in leaving:
            task.cancel()
        for served in (*self._registry.served, *leaving.values()):
            await asyncio.to_thread(served.model.engine.stop)

    def _check_names(self, wanted: Iterable[ModelSpec]) -> None:
        """Raise ConfigError where a wanted name is that of an adapter which a client has loaded elsewhere."""
        for spec in wanted:
            for name in (spec.name, *spec.aliases):
                base = self._registry.base_of(name)
                if base and base.name != spec.name and name not in base.spec.aliases:
                    raise ConfigError(
                        f"the name {name!r} is that of an adapter loaded for {base.name!r}", hint="unload it first"
                    )

    async def _load_wholly(self, spec: ModelSpec, undo: contextlib.AsyncExitStack) -> ServedModel:
        """Load a model with all of its adapters, or raise."""
        undo.callback(self._registry.mark, spec.name, self._registry.statuses.get(spec.name))
        served = await self._load(spec)
        undo.push_async_callback(asyncio.to_thread, served.model.engine.stop)
        for alias, error in served.model.lora.failures.items() if served.model.lora else ():
            raise ConfigError(f"adapter {alias!r} of {spec.name!r}: {error.message}", hint=error.hint) from error
        await _carry_over(self._registry.get(spec.name), served)
        return served

    async def _apply(self, served: ServedModel, spec: ModelSpec, undo: contextlib.AsyncExitStack) -> None:
        """Bring the adapters of a served model to what `spec` wants, all or none. Raises what is wrong with one."""
        lora, before = served.model.lora, served.spec.lora
        if lora is None or spec.lora is None or before is None:
            return
        await asyncio.to_thread(lora.apply, spec.lora)
        log.info("model %s: adapters are now %s", spec.name, ", ".join(spec.aliases) or "none")

        async def restore() -> None:
            try:
                await asyncio.to_thread(lora.apply, before)
            except OvmsLoraError as error:
                log.error("model %s: the adapters before cannot be restored: %s", spec.name, error.message)

        undo.push_async_callback(restore)

    async def _load(self, spec: ModelSpec) -> ServedModel:
        if self._registry.get(spec.name) is None:
            self._registry.mark(spec.name, _status(spec, ModelState.LOADING))
        log.info("loading model %s from %s", spec.name, spec.folder)
        if spec.entry.without_effect:
            log.info("model %s: without effect here: %s", spec.name, ", ".join(spec.entry.without_effect))
        bridge = AsyncEngine(asyncio.get_running_loop(), buffered_outputs=self._limits.buffered_outputs)
        model = await asyncio.to_thread(
            self._load_model,
            **spec.load_arguments,
            deliver=bridge.deliver,
            max_waiting=self._limits.waiting_requests,
        )
        bridge.attach(model.engine)
        served = ServedModel(spec, model, bridge)
        await self._warm(served)
        log.info("model %s is available", spec.name)
        await asyncio.to_thread(_log_adapters, served)
        return served

    async def _warm(self, served: ServedModel) -> None:
        """Run one token through the whole path, so that the first client does not wait for what is done once."""
        request = GenerationRequest("warm-up", (0,), SamplingParams(temperature=0, max_tokens=1))
        try:
            stream = served.engine.open([request])
            async for _ in stream:
                pass
            stream.close()
        except OvmsLoraError as error:
            await asyncio.to_thread(served.model.engine.stop)
            raise ModelFolderError(f"{served.spec.folder}: the model does not run: {error.message}") from error

    def _remove(self, name: str) -> None:
        if self._registry.get(name) is None:
            self._registry.end(name)
            return
        self._retire(self._registry.remove(name))

    def _retire(self, served: ServedModel) -> None:
        """Let a model's requests end, then stop its engine, beside everything else."""
        task = asyncio.create_task(self._drain(served))
        self._leaving[task] = served
        task.add_done_callback(self._leaving.pop)

    async def _drain(self, served: ServedModel) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.request_seconds):
                while served.engine.active_calls:
                    await asyncio.sleep(0.05)
        await asyncio.to_thread(served.model.engine.stop)
        if self._registry.get(served.name) is None:
            self._registry.end(served.name)
        log.info("model %s was unloaded", served.spec.folder)


def _status(spec: ModelSpec, state: ModelState, error: str | None = None) -> ModelStatus:
    return ModelStatus(state, error, spec.aliases, spec.version)


async def _carry_over(before: ServedModel | None, after: ServedModel) -> None:
    """Load what clients have loaded for a model into the one that replaces it, as far as it still fits."""
    old, new = before.model.lora if before else None, after.model.lora
    for spec in old.by_clients if old else ():
        try:
            if new is None:
                log.error("adapter %s of model %s is gone: the model takes no adapters now", spec.alias, after.name)
            elif not new.has(spec.alias):
                await asyncio.to_thread(new.load, spec)
        except OvmsLoraError as error:
            log.error("adapter %s of model %s does not fit any more: %s", spec.alias, after.name, error.message)


def _log_adapters(served: ServedModel) -> None:
    lora = served.model.lora
    if lora is None:
        return
    loaded = ", ".join(card.alias for card in lora.cards())
    log.info("model %s takes adapters; loaded: %s", served.name, loaded or "none")
    for alias, error in lora.failures.items():
        log.error("adapter %s of model %s cannot be loaded: %s", alias, served.name, error.message)
    path = served.spec.lora.loading_path if served.spec.lora else None
    if isinstance(path, Path) and not path.is_dir():
        log.warning("the loading path %s of model %s is not a folder", path, served.name)
    elif path and lora.loading_path:
        log.info("the loading path %s of model %s has %d adapters", path, served.name, len(lora.loading_path.names()))
