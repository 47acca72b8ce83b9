"""ModelRegistry: which models are served now, in which state each is, and what a request's `model` selects.

Owns the map from names to served models, on the event loop only. Loading and removing them is `lifecycle`'s work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from ovms_lora.core.errors import ModelNotFoundError, UnavailableError
from ovms_lora.core.names import split_model
from ovms_lora.server.fields import DRAFT_MODEL, PROMPT_LOOKUP, ModelLimits
from ovms_lora.server.options import Limits

if TYPE_CHECKING:
    from ovms_lora.engine.model import LoadedModel
    from ovms_lora.server.async_engine import AsyncEngine
    from ovms_lora.server.model_source import ModelSpec


class ModelState(StrEnum):
    """OVMS's states of a model version."""

    START = "START"
    LOADING = "LOADING"
    AVAILABLE = "AVAILABLE"
    UNLOADING = "UNLOADING"
    END = "END"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model's state; `error` says why it cannot be loaded, `aliases` are the names that come with it."""

    state: ModelState
    error: str | None = None
    aliases: tuple[str, ...] = ()
    version: int = 1

    @property
    def expected(self) -> bool:
        """Whether it is wanted and not there yet."""
        return self.state in (ModelState.START, ModelState.LOADING)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that answers requests."""

    spec: ModelSpec
    model: LoadedModel
    engine: AsyncEngine
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """The name under which it is served."""
        return self.spec.name

    def limits(self, server: Limits) -> ModelLimits:
        """Return what its options and the server allow a request to ask for."""
        options = self.model.options
        speculation = options.speculation
        return ModelLimits(
            options.max_tokens_limit,
            options.best_of_limit,
            self.model.lora is not None,
            server,
            None if speculation is None else PROMPT_LOOKUP if speculation.looks_up else DRAFT_MODEL,
        )

    def knows(self, alias: str) -> bool:
        """Whether an adapter or composite has this alias: loaded, or configured and refused."""
        lora = self.model.lora
        return lora is not None and (lora.has(alias) or alias in lora.failures)


@dataclass(frozen=True, slots=True)
class Selection:
    """What `model` of a request selects: a served model, and an adapter or composite of it (None: the plain base)."""

    served: ServedModel
    alias: str | None = None


class ModelRegistry:
    """All models by name."""

    def __init__(self) -> None:
        self._served: dict[str, ServedModel] = {}
        self._status: dict[str, ModelStatus] = {}

    @property
    def served(self) -> tuple[ServedModel, ...]:
        """The models that answer requests, in the order in which they came."""
        return tuple(self._served.values())

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """The states of all models, removed and failed ones too."""
        return self._status

    def get(self, name: str) -> ServedModel | None:
        """Return a served model by its own name."""
        return self._served.get(name)

    def resolve(self, model: str) -> Selection:
        """Return what a request's `model` selects: a model, an alias, or `<base>:<alias>`. Does no I/O.

        Raises ModelNotFoundError, or UnavailableError while the model is being loaded or could not be.
        """
        served = self._served.get(model)
        if served:
            return Selection(served)
        base, alias = split_model(model)
        if alias is None:
            alias, bases = model, self.served
        else:
            bases = tuple(filter(None, [self._served.get(base)]))
        for served in bases:
            if served.knows(alias):
                return Selection(served, alias)
        for name, status in self._status.items():
            if status.expected and (name in (model, base) or model in status.aliases):
                raise UnavailableError("Mediapipe graph definition with requested name is not loaded yet")
        raise ModelNotFoundError(model)

    def on_loading_paths(self, model: str) -> Iterator[Selection]:
        """Yield what a `model` that `resolve` does not know may select, should a loading path hold its adapter."""
        base, alias = split_model(model)
        name = model if alias is None else alias
        if name in self._served:  # a model's name is no adapter's
            return
        for served in self.served:
            if served.model.lora is not None and (alias is None or served.name == base):
                yield Selection(served, name)

    def base_of(self, alias: str) -> ServedModel | None:
        """Return the model that has an adapter or composite of this alias loaded."""
        bases = (served for served in self.served if served.model.lora and served.model.lora.has(alias))
        return next(bases, None)

    def put(self, served: ServedModel) -> ServedModel | None:
        """Serve a model from now on; return the one that it replaces."""
        replaced = self._served.get(served.name)
        self._served[served.name] = served
        self._status[served.name] = ModelStatus(ModelState.AVAILABLE, version=served.spec.version)
        return replaced

    def remove(self, name: str) -> ServedModel:
        """Serve a model no more; requests that run go on."""
        self._status[name] = replace(self._status[name], state=ModelState.UNLOADING)
        return self._served.pop(name)

    def mark(self, name: str, status: ModelStatus | None) -> None:
        """Note a model's state, None that there never was such a model; a served model stays served."""
        if status is None:
            self._status.pop(name, None)
        else:
            self._status[name] = status

    def end(self, name: str) -> None:
        """Note that a model is gone."""
        self._status[name] = ModelStatus(ModelState.END, version=self._status[name].version)
