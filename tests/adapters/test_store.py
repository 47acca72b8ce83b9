"""The store: an alias has the adapter it was given, host memory holds so many and no more, and nothing lives longer."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ovms_lora.adapters import store as store_module
from ovms_lora.adapters.adapter import Adapter, load_adapter
from ovms_lora.adapters.store import AdapterStore, Registered
from ovms_lora.core.errors import AdapterError, AdapterErrorCode, AdapterNotFoundError, UnknownAliasError
from tests.adapters.adapter_files import good_config, tiny_base, write_adapter

F32 = np.dtype(np.float32)
FOLDERS = [Path(f"folder{number}") for number in range(4)]
ALIASES = ["a", "b", "c", "d"]


def made(digest: str) -> Adapter:
    return Adapter(digest, None, {"q_proj": mock.Mock(rank=2)}, F32)  # type: ignore[arg-type]  # never looked at


class StoreMachine(RuleBasedStateMachine):
    """Random loads, uses and removals beside a model of what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.content = {folder: f"digest {number}" for number, folder in enumerate(FOLDERS)}
        self.reads: Counter[Path] = Counter()
        self.aliases: dict[str, tuple[Path, str]] = {}
        self.recent: OrderedDict[str, None] = OrderedDict()
        self.held: list[Adapter] = []
        self.seen: list[tuple[str, weakref.ref[Adapter]]] = []
        self.patch = mock.patch.object(store_module, "load_adapter", self.load)
        self.patch.start()

    def teardown(self) -> None:
        self.patch.stop()

    def load(self, folder: Path, *_: Any, **__: Any) -> Adapter:
        self.reads[folder] += 1
        adapter = made(self.content[folder])
        adapter_frozen = weakref.ref(adapter)
        self.seen.append((adapter.digest, adapter_frozen))
        return adapter

    @initialize(most=st.integers(1, 3))
    def start(self, most: int) -> None:
        self.most = most
        self.store = AdapterStore(tiny_base(), max_lora_rank=64, max_cpu_loras=most, dtype=F32)

    def used(self, digest: str) -> None:
        self.recent[digest] = None
        self.recent.move_to_end(digest)
        while len(self.recent) > self.most:
            self.recent.popitem(last=False)

    def gone(self, digest: str) -> None:
        if all(other != digest for _, other in self.aliases.values()):
            self.recent.pop(digest, None)

    def alive(self, digest: str) -> bool:
        return digest in self.recent or any(adapter.digest == digest for adapter in self.held)

    @rule(alias=st.sampled_from(ALIASES), folder=st.sampled_from(FOLDERS))
    def register(self, alias: str, folder: Path) -> None:
        adapter = self.store.read(folder)
        self.used(adapter.digest)
        before = self.aliases.get(alias)
        self.store.register(Registered.of(alias, folder, adapter, alpha=1.0, pinned=False))
        self.aliases[alias] = (folder, adapter.digest)
        if before:
            self.gone(before[1])

    @rule(alias=st.sampled_from(ALIASES))
    def remove(self, alias: str) -> None:
        if alias not in self.aliases:
            with pytest.raises(UnknownAliasError):
                self.store.remove(alias)
            return
        self.store.remove(alias)
        self.gone(self.aliases.pop(alias)[1])

    @rule(alias=st.sampled_from(ALIASES), hold=st.booleans())
    def get(self, alias: str, hold: bool) -> None:
        if alias not in self.aliases:
            with pytest.raises(UnknownAliasError):
                self.store.get(alias)
            return
        folder, digest = self.aliases[alias]
        reads, there = self.reads[folder], self.alive(digest)
        entry, adapter = self.store.get(alias)
        assert self.reads[folder] == reads + (not there), "it is read exactly when it is not in memory"
        expected = digest if there else self.content[folder]
        assert entry.digest == adapter.digest == expected
        self.aliases[alias] = (folder, expected)
        self.used(expected)
        self.gone(digest)
        if hold:
            self.held.append(adapter)

    @rule(folder=st.sampled_from(FOLDERS), digest=st.sampled_from(["digest 0", "digest 7", "digest 8"]))
    def change(self, folder: Path, digest: str) -> None:
        self.content[folder] = digest

    @rule()
    def release(self) -> None:
        self.held.clear()

    @invariant()
    def what_lives_is_what_is_held_or_recent(self) -> None:
        living = Counter(digest for digest, adapter in self.seen if adapter() is not None)
        assert set(living) == {digest for digest, _ in self.seen if self.alive(digest)}
        assert all(count == 1 for count in living.values()), "one object for one content"
        assert len(self.recent) <= getattr(self, "most", 3)

    @invariant()
    def aliases_are_those_that_were_given(self) -> None:
        if hasattr(self, "store"):
            assert {a: (e.folder, e.digest) for a, e in self.store.registered.items()} == self.aliases


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def store() -> Iterator[AdapterStore]:
    yield AdapterStore(tiny_base(), max_lora_rank=64, max_cpu_loras=2, dtype=F32)


def add(store: AdapterStore, alias: str, folder: Path, *, lora_alpha: float = 4) -> Adapter:
    write_adapter(folder, config=good_config(lora_alpha=lora_alpha))
    adapter = store.read(folder)
    store.register(Registered.of(alias, folder, adapter, alpha=1.0, pinned=False))
    return adapter


def test_an_entry_tells_of_its_adapter(store: AdapterStore, tmp_path: Path) -> None:
    adapter = add(store, "sql", tmp_path / "sql")
    entry = store.registered["sql"]
    assert (entry.digest, entry.max_rank, entry.paths) == (adapter.digest, 2, frozenset(adapter.layers))
    assert store.get("sql") == (entry, adapter)


def test_a_folder_gone_bad_is_refused_when_it_is_read_again(store: AdapterStore, tmp_path: Path) -> None:
    for number in range(3):
        add(store, f"x{number}", tmp_path / str(number), lora_alpha=number + 1)
    (tmp_path / "0" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterError):
        store.get("x0")
    assert store.get("x2")
    write_adapter(tmp_path / "0")
    assert store.get("x0")


def test_a_folder_that_is_not_there(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        store.read(tmp_path / "nowhere")


def test_many_who_want_one_adapter_read_it_once(store: AdapterStore, tmp_path: Path) -> None:
    for number in range(3):
        add(store, f"x{number}", tmp_path / str(number), lora_alpha=number + 1)
    reads: list[Path] = []

    def slowly(folder: Path, *arguments: Any, **options: Any) -> Adapter:
        reads.append(folder)
        time.sleep(0.05)
        return load_adapter(folder, *arguments, **options)

    got: list[Adapter] = []
    with mock.patch.object(store_module, "load_adapter", slowly):
        threads = [threading.Thread(target=lambda: got.append(store.get("x0")[1])) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert reads == [tmp_path / "0"]
    assert len({id(adapter) for adapter in got}) == 1


@pytest.mark.parametrize("bad", [False, True], ids=["another version", "half written"])
@pytest.mark.parametrize("given_away", ["unloaded", "replaced"])
def test_an_alias_that_is_given_away_while_its_folder_is_read_stays_so(
    store: AdapterStore, tmp_path: Path, given_away: str, bad: bool
) -> None:
    first, second = (write_adapter(tmp_path / name, config=good_config(lora_alpha=n)) for n, name in enumerate("ab", 1))
    store.register(Registered.of("x", first, store.read(first), alpha=1.0, pinned=False))
    store._host.clear()  # as if others had pushed it out
    write_adapter(first, config=good_config(lora_alpha=3))

    def meanwhile(folder: Path, *args: Any, **kwargs: Any) -> Adapter:
        reading.stop()
        adapter = load_adapter(folder, *args, **kwargs)
        if given_away == "unloaded":
            store.remove("x")
        else:
            store.register(Registered.of("x", second, store.read(second), alpha=1.0, pinned=False))
        if bad:
            raise AdapterError(AdapterErrorCode.TRUNCATED, "cut")
        return adapter

    reading = mock.patch.object(store_module, "load_adapter", meanwhile)
    reading.start()
    if given_away == "unloaded":
        with pytest.raises(UnknownAliasError):
            store.get("x")
        assert not store.registered
        assert not store._host
    else:
        entry, adapter = store.get("x")
        assert entry.folder == second
        assert list(store._host) == [adapter.digest]


def test_what_only_its_last_requests_hold_does_not_come_back(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    held = store.read(folder)
    store.register(Registered.of("x", folder, held, alpha=1.0, pinned=False))
    entry = store.registered["x"]
    store.remove("x")
    assert store._found(entry) == (entry, held)  # someone had looked the alias up just before
    assert not store._host


def test_tensors_are_kept_in_the_store_s_type(tmp_path: Path) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16)
    store = AdapterStore(tiny_base(), max_lora_rank=64, max_cpu_loras=2, dtype=dtype)
    adapter = add(store, "sql", tmp_path)
    assert {pair.a.dtype for pair in adapter.layers.values()} == {dtype}
    assert adapter.nbytes == 2 * sum(pair.a.size + pair.b.size for pair in adapter.layers.values())
