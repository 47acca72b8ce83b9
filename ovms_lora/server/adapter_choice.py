"""AdapterChoice: what a request's fields say of adapters, beside the name in `model`.

Owns how `model`, `lora_alphas` and `lora` go together; strengths and files are the runtime's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ovms_lora.core.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    InvalidFieldError,
    ModelNotFoundError,
)
from ovms_lora.core.request import AdapterUse

if TYPE_CHECKING:
    from ovms_lora.engine.lora_runtime import LoraRuntime
    from ovms_lora.server.registry import Selection


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """`strengths` override those of what `model` selects; `blend` is adapters of the base that `model` names."""

    strengths: Mapping[str, float] | None = None
    blend: tuple[tuple[str, float | None], ...] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> AdapterChoice:
        """Return the choice in the checked fields of a request."""
        return cls(values.get("lora_alphas"), values.get("lora"))

    @property
    def blended(self) -> tuple[str, ...]:
        """The aliases of the blend."""
        return tuple(alias for alias, _ in self.blend or ())

    def names(self, selection: Selection) -> tuple[str, ...]:
        """Return the aliases that the request names. Raises InvalidFieldError where a blend has no base."""
        if self.blend is not None and selection.alias is not None:
            raise InvalidFieldError(
                f"lora needs the base in model: '{selection.served.name}', not an adapter", param="lora"
            )
        if self.blend is not None:
            return self.blended
        return () if selection.alias is None else (selection.alias,)

    def uses(self, selection: Selection) -> tuple[AdapterUse, ...]:
        """Return the adapters with their strengths, loaded; may read files, so it is for a thread.

        Raises ModelNotFoundError, AdapterUnavailableError, or InvalidFieldError for a strength that does not belong.
        """
        lora = selection.served.model.lora
        assert lora is not None, "only a model with runtime adapters has any to choose"
        with self.told(selection):
            if selection.alias is not None:
                return lora.select(selection.alias, self.strengths)
            return lora.blend(self.blend or ())

    @contextlib.contextmanager
    def told(self, selection: Selection) -> Iterator[None]:
        """Turn what loading adapters raises into what the client is told."""
        try:
            yield
        except ModelNotFoundError as error:
            lora = selection.served.model.lora
            raise _unavailable(lora, error) if lora else error from error
        except AdapterNotFoundError as error:  # its folder has gone since
            raise ModelNotFoundError(selection.alias or error.path) from error


def _unavailable(lora: LoraRuntime, error: ModelNotFoundError) -> Exception:
    """Tell a name that is configured, but was refused at load, from one that nobody knows."""
    failure = lora.failures.get(error.name)
    return AdapterUnavailableError(failure) if isinstance(failure, AdapterError) else error
