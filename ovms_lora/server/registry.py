"""ModelRegistry: which models are served now, in which state each is, and what a request's `model` selects.

Owns the map from names to served models, on the event loop only. Loading and removing them is `lifecycle`'s work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ovms_lora.core.errors import ModelNotFoundError, UnavailableError
from ovms_lora.core.request import AdapterUse
from ovms_lora.server.fields import ModelLimits

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
    """A model's state; `error` says why it cannot be loaded."""

    state: ModelState
    error: str | None = None


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

    @property
    def limits(self) -> ModelLimits:
        """What its options allow a request to ask for."""
        options = self.model.options
        return ModelLimits(options.max_tokens_limit, options.best_of_limit)


@dataclass(frozen=True, slots=True)
class Selection:
    """What `model` of a request selects: a served model, and adapters to apply (none: the plain base)."""

    served: ServedModel
    adapters: tuple[AdapterUse, ...] = ()


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
        """Return what a request's `model` selects.

        Raises ModelNotFoundError, or UnavailableError while the model is being loaded or could not be.
        """
        served = self._served.get(model)
        if served:
            return Selection(served)
        status = self._status.get(model)
        if status and status.state in (ModelState.START, ModelState.LOADING):
            raise UnavailableError("Mediapipe graph definition with requested name is not loaded yet")
        raise ModelNotFoundError(model)

    def put(self, served: ServedModel) -> ServedModel | None:
        """Serve a model from now on; return the one that it replaces."""
        replaced = self._served.get(served.name)
        self._served[served.name] = served
        self._status[served.name] = ModelStatus(ModelState.AVAILABLE)
        return replaced

    def remove(self, name: str) -> ServedModel:
        """Serve a model no more; requests that run go on."""
        self._status[name] = ModelStatus(ModelState.UNLOADING)
        return self._served.pop(name)

    def mark(self, name: str, state: ModelState, error: str | None = None) -> None:
        """Note a model's state; a served model stays served."""
        self._status[name] = ModelStatus(state, error)
