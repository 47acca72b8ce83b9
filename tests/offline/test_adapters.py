"""Adapters are told by their folders; names and numbers never come to mean another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import pytest

from ovms_lora.core.errors import ArgumentError, ModelNotFoundError
from ovms_lora.core.request import AdapterUse
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.offline.adapters import RequestedAdapters
from ovms_lora.offline.lora_request import LoRARequest
from tests.offline.fake_llm import FakeRuntime, adapter


class Adapters:
    """RequestedAdapters over a fake runtime, and two adapters."""

    def __init__(self, folder: Path) -> None:
        self.sql, self.tools = adapter(folder / "sql"), adapter(folder / "tools")
        self.runtime = FakeRuntime()
        self.requested = RequestedAdapters(cast(LoraRuntime, self.runtime))

    def use(self, *request: object) -> str:
        """Load an adapter; return which one it is."""
        made = LoRARequest(*request)  # type: ignore[arg-type]
        self.requested.load(made)
        return self.requested.uses(made)[0].digest


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    return Adapters(tmp_path)


def test_a_folder_is_loaded_once(adapters: Adapters, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapters.sql)
    asked = [("sql", 1, adapters.sql), ("sql", 1, f"{adapters.sql}/"), ("again", 2, f"{adapters.tools}/../sql")]
    assert [adapters.use(*each) for each in [*asked, ("link", 3, tmp_path / "link")]] == ["sql"] * 4
    assert len(adapters.runtime.loads) == 1


def test_relative_paths_and_homes_lead_to_the_same_folder(
    adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [adapters.use("a", 1, "sql"), adapters.use("a", 1, "~/sql")] == ["sql", "sql"]
    assert len(adapters.runtime.loads) == 1


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [("other", 1, "lora_int_id 1 stands for .*/sql already"), ("sql", 2, "lora_name 'sql' stands for .*/sql already")],
)
def test_a_known_name_or_number_with_another_folder_is_refused(
    adapters: Adapters, name: str, number: int, message: str
) -> None:
    adapters.use("sql", 1, adapters.sql)
    with pytest.raises(ArgumentError, match=message):
        adapters.use(name, number, adapters.tools)
    assert adapters.use("tools", 3, adapters.tools) == "tools"
    assert adapters.use("sql", 1, adapters.sql) == "sql"


@pytest.mark.parametrize("name", ["text", "my adapter", "org/sql", "ünïcödé", ""])
def test_a_name_may_be_any_string(adapters: Adapters, name: str) -> None:
    assert adapters.use(name, 1, adapters.sql) == "sql"


def test_a_missing_folder_takes_neither_name_nor_number(adapters: Adapters) -> None:
    with pytest.raises(ArgumentError, match=r"Loading lora sql failed: No adapter found for .*/gone"):
        adapters.use("sql", 1, f"{adapters.sql}/gone")
    assert adapters.use("sql", 1, adapters.sql) == "sql"


def test_a_folder_that_has_changed_is_refused(adapters: Adapters) -> None:
    adapters.use("sql", 1, adapters.sql)
    (Path(adapters.sql) / "adapter_model.safetensors").write_bytes(b"new")
    with pytest.raises(ArgumentError, match="has changed or gone since it was loaded"):
        adapters.use("sql", 1, adapters.sql)


def test_a_folder_that_has_gone_is_refused(adapters: Adapters) -> None:
    adapters.use("sql", 1, adapters.sql)
    shutil.rmtree(adapters.sql)
    with pytest.raises(ArgumentError, match="has changed or gone since it was loaded"):
        adapters.use("sql", 1, adapters.sql)


def test_what_the_runtime_refuses_later_names_the_adapter(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(alias: str) -> tuple[AdapterUse, ...]:
        raise ModelNotFoundError(alias)

    monkeypatch.setattr(adapters.runtime, "select", refuse)
    with pytest.raises(ArgumentError, match="Loading lora sql failed"):
        adapters.use("sql", 1, adapters.sql)
