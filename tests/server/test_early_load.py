"""A model whose loading begins before the server asks for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from ovms_lora.core.config import ModelEntry
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.request import SequenceOutput
from ovms_lora.engine.engine import Deliver
from ovms_lora.engine.model import LoadedModel
from ovms_lora.server.early_load import EarlyLoad
from ovms_lora.server.model_source import ModelSpec, ReadAlready


class Loads:
    """Notes what is loaded; each model is its number and can be stopped."""

    def __init__(self, failure: Exception | None = None, ended: threading.Event | None = None) -> None:
        self.ended = ended  # a load ends no sooner
        self.folders: list[Path] = []
        self.delivers: list[Deliver] = []
        self.stopped: list[int] = []
        self.threads: list[int] = []
        self.compiling = False
        self.failure = failure

    def __call__(
        self, folder: Path, *, deliver: Deliver, on_compile: Callable[[], None] = lambda: None, **what: Any
    ) -> LoadedModel:
        self.folders.append(folder)
        self.delivers.append(deliver)
        self.threads.append(threading.get_ident())
        if self.failure:
            raise self.failure
        if self.ended:
            time.sleep(0.05)  # for who does not wait
            self.compiling = True
            on_compile()
            assert self.ended.wait(10)
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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


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


def test_others_go_on_when_the_device_compiles() -> None:
    loads = Loads(ended=threading.Event())
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert loads.compiling
    assert loads.ended
    loads.ended.set()
    assert ask(early, spec("a"), ignore).number == 1


def test_another_model_is_loaded_and_the_one_that_was_begun_stopped() -> None:
    loads = Loads()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert ask(early, spec("b"), ignore).number == 2
    assert loads.folders == [Path("a"), Path("b")]
    wait_for(lambda: loads.stopped == [1])


def test_other_arguments_are_another_model() -> None:
    loads = Loads()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert ask(early, spec("a"), ignore, max_waiting=5).number == 2
    wait_for(lambda: loads.stopped == [1])


def test_a_model_is_given_once() -> None:
    loads = Loads()
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    assert [ask(early, spec("a"), ignore).number for _ in range(2)] == [1, 2]
    assert not loads.stopped


def test_what_was_begun_and_fails_fails_for_who_asks_for_it() -> None:
    loads = Loads(ModelFolderError("no IR"))
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    with pytest.raises(ModelFolderError, match="no IR"):
        ask(early, spec("a"), ignore)
    assert loads.folders == [Path("a")]


def test_what_was_begun_and_fails_is_nothing_to_who_asks_for_another() -> None:
    loads = Loads(RuntimeError("anything"))
    early = EarlyLoad(loads)
    early.begin(spec("a"), max_waiting=4)
    wait_for(lambda: bool(loads.folders))
    loads.failure = None
    assert ask(early, spec("b"), ignore).number == 2


def test_what_nobody_has_asked_for_is_stopped_at_the_end() -> None:
    loads = Loads()
    with EarlyLoad(loads) as early:
        early.begin(spec("a"), max_waiting=4)
    wait_for(lambda: loads.stopped == [1])


def test_a_source_that_was_read_gives_that_once_more() -> None:
    read, later = (spec("a"),), (spec("b"),)

    class Source:
        def read(self) -> tuple[ModelSpec, ...]:
            return later

        def changed(self) -> bool:
            return True

    source = ReadAlready(Source(), read)
    assert source.changed()
    assert [source.read(), source.read()] == [read, later]
