"""EarlyLoad: a model that is loaded while the rest of the server is still being imported and built.

    begin(spec) ──► thread: load ──┐
    the server asks for a model ───┴─ the same? ── yes ──► that one;  no ──► it is stopped, and another loaded

Compiling a graph takes most of a start and leaves the interpreter to others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ovms_lora.server.model_source import ModelSpec

if TYPE_CHECKING:
    from ovms_lora.core.request import SequenceOutput
    from ovms_lora.engine.engine import Deliver
    from ovms_lora.engine.lora_config import LoraConfig
    from ovms_lora.engine.model import LoadedModel


class LoadModel(Protocol):
    """Loads a model folder and starts its engine; `ovms_lora.engine.model.load_model` in service."""

    def __call__(
        self,
        folder: Path,
        *,
        deliver: Deliver,
        graph_path: str | None,
        device: str | None,
        plugin_config: dict[str, Any],
        overrides: Mapping[str, Any],
        lora: LoraConfig | None,
        max_waiting: int,
        on_compile: Callable[[], None] = ...,
    ) -> LoadedModel:
        """Return the loaded model; adapters that cannot be loaded stand in its `lora.failures`.

        `on_compile` is called when the device begins to compile. Raises ModelFolderError.
        """


class EarlyLoad:
    """A LoadModel that may have begun before it is called; a context that lets nothing run on for nobody."""

    def __init__(self, load: LoadModel) -> None:
        self._load = load
        self._begun: _Begun | None = None

    def __enter__(self) -> EarlyLoad:
        return self

    def __exit__(self, *error: object) -> None:
        if self._begun:
            self._begun.stop()

    def begin(self, spec: ModelSpec, *, max_waiting: int) -> None:
        """Load a model in a thread of its own; who asks for it gets it, or what it raised.

        Returns when the device compiles: up to there two threads of Python would hinder each other.
        """
        deliver, compiles = _LateDeliver(), threading.Event()
        pool = ThreadPoolExecutor(1, thread_name_prefix="early-load")
        model = pool.submit(
            self._load, **spec.load_arguments, deliver=deliver, max_waiting=max_waiting, on_compile=compiles.set
        )
        pool.shutdown(wait=False)
        self._begun = _Begun({**spec.load_arguments, "max_waiting": max_waiting}, deliver, model)
        model.add_done_callback(lambda _: compiles.set())  # also when it fails before
        compiles.wait()

    def __call__(self, folder: Path, *, deliver: Deliver, **what: Any) -> LoadedModel:
        """Return the model that was begun if it is the one that is asked for; else load it.

        Raises what loading does.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return self._load(folder, deliver=deliver, **what)
        if begun.what == {"folder": folder, **what}:
            begun.deliver.to = deliver
            return begun.model.result()
        begun.stop()
        return self._load(folder, deliver=deliver, **what)


class _LateDeliver:
    """Hands outputs on to whoever is named once there is somebody; an engine has none before it is asked."""

    to: Deliver | None = None

    def __call__(self, outputs: Sequence[SequenceOutput]) -> None:
        assert self.to, "nobody has asked for the model yet"
        self.to(outputs)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A model that is being loaded, and with which arguments."""

    what: Mapping[str, Any]
    deliver: _LateDeliver
    model: Future[LoadedModel]

    def stop(self) -> None:
        """Stop its engine, once there is one."""
        self.model.add_done_callback(_stop)


def _stop(model: Future[LoadedModel]) -> None:
    if model.exception() is None:
        model.result().engine.stop()
