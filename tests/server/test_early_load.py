"""A model whose loading begins before the server asks for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from ovms_lora.core.config import ModelEntry
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.request import SequenceOutput
from ovms_lora.engine.engine import Deliver
from ovms_lora.engine.model import LoadedModel
from ovms_lora.server.early_load import EarlyLoad
from ovms_lora.server.model_source import ModelSpec


class Loads:
    """Notes what is loaded; each model is its number and can be stopped."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.folders: list[Path] = []
        self.delivers: list[Deliver] = []
        self.stopped: list[int] = []
        self.threads: list[int] = []
        self._failure = failure

    def __call__(self, folder: Path, *, deliver: Deliver, **what: Any) -> LoadedModel:
        self.folders.append(folder)
        self.delivers.append(deliver)
        self.threads.append(threading.get_ident())
        if self._failure:
            raise self._failure
        return cast(LoadedModel, Model(len(self.folders), self.stopped))


class Model:
    def __init__(self, number: int, stopped: list[int]) -> None:
        self.number, self._stopped = number, stopped
        self.engine = self

    def stop(self) -> None:
        self._stopped.append(self.number)


def spec(name: str) -> ModelSpec:
    return ModelSpec(ModelEntry(name=name, base_path=name), Path(name), ())


def ask(load: EarlyLoad, wanted: ModelSpec, deliver: Deliver, max_waiting: int = 4) -> Model:
    return cast(Model, load(**wanted.load_arguments, deliver=deliver, max_waiting=max_waiting))


def ignore(outputs: Sequence[SequenceOutput]) -> None:
    del outputs


def test_the_model_that_was_begun_is_loaded_once_and_elsewhere() -> None:
    loads, heard = Loads(), list[Sequence[SequenceOutput]]()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert ask(early, spec("a"), heard.append).number == 1
    assert loads.folders == [Path("a")]
    assert loads.threads != [threading.get_ident()]
    loads.delivers[0]([])
    assert heard == [[]]


def test_another_model_is_loaded_and_the_one_that_was_begun_stopped() -> None:
    loads = Loads()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert ask(early, spec("b"), ignore).number == 2
    assert loads.folders == [Path("a"), Path("b")]
    assert loads.stopped == [1]


def test_other_arguments_are_another_model() -> None:
    loads = Loads()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert ask(early, spec("a"), ignore, max_waiting=5).number == 2
    assert loads.stopped == [1]


def test_a_model_is_given_once() -> None:
    loads = Loads()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert [ask(early, spec("a"), ignore).number for _ in range(2)] == [1, 2]
    assert not loads.stopped


@pytest.mark.parametrize(("wanted", "loaded"), [("a", 1), ("b", 2)])
def test_what_was_begun_and_fails_fails_for_who_asks_for_it(wanted: str, loaded: int) -> None:
    loads = Loads(ModelFolderError("no IR"))
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    with pytest.raises(ModelFolderError, match="no IR"):
        ask(early, spec(wanted), ignore)
    assert len(loads.folders) == loaded
