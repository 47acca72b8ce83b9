"""AdapterUpdates: adapters that clients load and unload while the server runs.

Owns which base gets an adapter, whether its name is free, and which folders it may come from; vLLM's messages are
here. Checking and holding the adapter is the runtime's work. One update at a time, none beside a reload.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from ovms_lora.core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    InvalidFieldError,
    ModelNotFoundError,
    UnavailableError,
)
from ovms_lora.core.names import check_alias
from ovms_lora.engine.lora_config import AdapterSpec

if TYPE_CHECKING:
    from ovms_lora.engine.lora_runtime import LoraRuntime
    from ovms_lora.server.lifecycle import Lifecycle
    from ovms_lora.server.lora_metrics import LoraMetrics
    from ovms_lora.server.registry import ModelRegistry, ServedModel
    from ovms_lora.server.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdapter:
    """An adapter that a client wants loaded; `base` None is the one model that takes adapters."""

    alias: str
    path: str
    base: str | None = None
    replace: bool = False
    pinned: bool = False


class AdapterUpdates:
    """Loads and unloads adapters for clients. All methods run on the event loop."""

    def __init__(
        self,
        registry: ModelRegistry,
        lifecycle: Lifecycle,
        metrics: LoraMetrics,
        workers: Workers,
        prefixes: Iterable[Path],
    ) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._workers = workers
        self._prefixes = tuple(prefixes)

    async def load(self, wanted: NewAdapter) -> None:
        """Load an adapter.

        Raises InvalidFieldError (name or base), HTTPException 403 (outside of the allowed folders) and 404 (no such
        folder), AdapterError (bad in itself).
        """
        self._check_running()
        _check_name(wanted.alias)
        async with self._lifecycle.changing:
            served, lora = self._base(wanted.base)
            self._check_free(wanted, served)
            folder = await self._workers.block(_real_path, wanted.path)
            await self._workers.block(self._check_allowed, folder, wanted.path, served)
            spec = AdapterSpec(wanted.alias, folder, pinned=wanted.pinned)
            try:
                with self._metrics.loading(wanted.alias, is_known=lora.has(wanted.alias)):
                    await self._workers.block(lora.load, spec, replace=wanted.replace)
            except AdapterExistsError as error:
                raise _taken(wanted.alias) from error
            except AdapterNotFoundError as error:
                message = f"Loading lora {wanted.alias} failed: No adapter found for {wanted.path}"
                raise HTTPException(404, message) from error
            except ConfigError as error:
                raise InvalidFieldError(error.message, param="lora_name") from error
        log.info("adapter %s of model %s loaded from %s", wanted.alias, served.name, folder)

    async def unload(self, alias: str) -> None:
        """Unload an adapter; requests that use it go on.

        Raises HTTPException 404 when it is unknown, InvalidFieldError when a composite is made of it.
        """
        self._check_running()
        async with self._lifecycle.changing:
            served = self._registry.base_of(alias)
            lora = served.model.lora if served else None
            missing = HTTPException(404, f"The lora adapter '{alias}' cannot be found.")
            if served is None or lora is None:
                raise missing
            try:
                await self._workers.block(lora.unload, alias)
            except AdapterNotFoundError as error:
                raise missing from error
            except ConfigError as error:
                raise InvalidFieldError(error.message, param="lora_name") from error
        log.info("adapter %s of model %s unloaded", alias, served.name)

    def _check_running(self) -> None:
        if self._lifecycle.draining or not self._lifecycle.started:
            raise UnavailableError("the server is shutting down" if self._lifecycle.draining else "models are loading")

    def _base(self, name: str | None) -> tuple[ServedModel, LoraRuntime]:
        takers = [served for served in self._registry.served if served.model.lora]
        if name is None and len(takers) > 1:
            raise InvalidFieldError("base_model_name is needed: several models take adapters", param="base_model_name")
        served = self._registry.get(name) if name is not None else next(iter(takers), None)
        if served is None and name is not None:
            raise ModelNotFoundError(name)
        if served is None or served.model.lora is None:
            message = "no model takes adapters" if served is None else f"the model '{name}' takes no adapters"
            raise InvalidFieldError(message, param="base_model_name")
        return served, served.model.lora

    def _check_free(self, wanted: NewAdapter, served: ServedModel) -> None:
        if wanted.alias in self._registry.statuses and self._registry.get(wanted.alias):
            raise InvalidFieldError(f"'{wanted.alias}' is the name of a model", param="lora_name")
        owner = self._registry.base_of(wanted.alias)
        if owner and owner.name != served.name:
            raise InvalidFieldError(f"'{wanted.alias}' is an adapter of the model '{owner.name}'", param="lora_name")
        if owner and not wanted.replace:
            raise _taken(wanted.alias)

    def _check_allowed(self, folder: Path, given: str, served: ServedModel) -> None:
        """Raise HTTPException 403 unless the folder, links resolved, lies in one that adapters may come from."""
        loading_path = served.spec.lora.loading_path if served.spec.lora else None
        allowed = (*self._prefixes, *([loading_path] if isinstance(loading_path, Path) else []))
        if not any(folder.is_relative_to(os.path.realpath(prefix)) for prefix in allowed):
            log.warning("refused to load an adapter from %s", ascii(given)[1:-1][:256])
            raise HTTPException(403, "lora_path is outside of the folders that adapters may be loaded from")


def _check_name(alias: str) -> None:
    try:
        check_alias(alias)
    except ConfigError as error:
        raise InvalidFieldError(error.message, param="lora_name") from error


def _real_path(path: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (ValueError, OSError) as error:  # a NUL byte, or bytes that no file name has
        raise InvalidFieldError("lora_path is not a path", param="lora_path") from error


def _taken(alias: str) -> InvalidFieldError:
    return InvalidFieldError(
        f"The lora adapter '{alias}' has already been loaded. "
        "If you want to load the adapter in place, set 'load_inplace' to True.",
        param="lora_name",
    )
