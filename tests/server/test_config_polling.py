"""config.json as it may be found while it is polled: the running state is kept, and each fault is logged once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ovms_lora.core.errors import ConfigError
from ovms_lora.server.fault_log import FaultLog
from ovms_lora.server.options import ServerOptions
from tests.server.serving import Served, serving, write_config
from tests.server.test_models import config

pytestmark = pytest.mark.anyio

POLL = 0.005


def good(*names: str) -> str:
    return json.dumps({"model_config_list": [{"config": {"name": name, "base_path": name}} for name in names]})


@contextlib.asynccontextmanager
async def polled(path: Path) -> AsyncIterator[Served]:
    async with serving(source=path, options=ServerOptions(poll_seconds=POLL)) as served:
        yield served


async def names(served: Served, *expected: str) -> None:
    """Wait until exactly these models are served."""
    async with asyncio.timeout(5):
        while {model.name for model in served.state.registry.served} != set(expected):
            await asyncio.sleep(POLL)


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "configuration was not reloaded" in record.message]


def delete(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.json")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half written": (lambda path: path.write_text(good("a", "b")[:40]), "is not valid JSON"),
    "emptied": (lambda path: path.write_text(""), "is not valid JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "cannot read"),
    "unknown key": (lambda path: path.write_text('{"model_config_list": [], "x": 1}'), "x: unknown key"),
    "a broken model": (lambda path: path.write_text(good("a", "broken")), "broken is not a model"),
    "deleted": (delete, "No such file"),
    "a folder": (replace_by_folder, "not a plain file"),
    "a pipe": (replace_by_pipe, "not a plain file"),
    "endless": (replace_by_endless, "not a plain file"),
    "a dead link": (link_to_nothing, "No such file"),
    "a circle": (link_to_itself, "Too many levels"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_an_unusable_file_changes_nothing(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil, message = HOSTILE[case]
    path = write_config(tmp_path, "a")
    async with polled(path) as served:
        spoil(path)
        await asyncio.sleep(20 * POLL)
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)
        assert list(await config(served)) == ["a"]
        assert (await served.client.get("/v2/health/ready")).status_code == 200
        (fault,) = faults(caplog)
        assert message in fault
        assert "\n" not in fault
        assert "hint: " in fault
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_text(good("b"))
        await names(served, "b")


async def test_a_file_that_may_not_be_read_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, "a")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    async with polled(path) as served:
        monkeypatch.setattr("ovms_lora.core.plain_file.os.open", refuse)  # the tests may run as root, who may all
        path.write_text(good("b"))
        await asyncio.sleep(20 * POLL)
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)
        (fault,) = faults(caplog)
        assert "Permission denied" in fault
        monkeypatch.undo()
        path.write_text(good("c"))
        await names(served, "c")


async def test_a_file_that_is_written_all_the_time_is_one_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path, "a")
    async with polled(path) as served:
        for end in range(100):
            path.write_text(good("a" * 50)[: 20 + end % 45])
            await asyncio.sleep(0.002)
        path.write_text(good("a"))
        await asyncio.sleep(20 * POLL)
        assert len({fault.partition(": line")[0] for fault in faults(caplog)}) == len(faults(caplog))
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)
        assert len(served.models.engines) == 1


async def test_a_good_file_that_is_written_all_the_time_reloads_nothing(tmp_path: Path) -> None:
    path, new = write_config(tmp_path, "a"), tmp_path / "new.json"
    async with polled(path) as served:
        for _ in range(100):
            new.write_text(good("a"))
            new.replace(path)
            await asyncio.sleep(0.002)
        assert len(served.models.engines) == 1


async def test_a_change_that_keeps_time_and_size_is_seen(tmp_path: Path) -> None:
    """What is written twice within one tick of the clock looks the same; the second content counts."""
    path = write_config(tmp_path, "a")
    async with polled(path) as served:
        path.write_text(good("b"))
        before = path.stat()
        await names(served, "b")
        path.write_text(good("c"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        await names(served, "c")


async def test_a_link_may_be_swapped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_config(tmp_path, name).rename(tmp_path / f"{name}.json")
    path = tmp_path / "config.json"
    path.symlink_to("a.json")
    async with polled(path) as served:
        (tmp_path / "next").symlink_to("b.json")
        (tmp_path / "next").replace(path)
        await names(served, "b")


def test_a_fault_is_logged_again_after_the_file_was_usable(caplog: pytest.LogCaptureFixture) -> None:
    faults_ = FaultLog(logging.getLogger("t"), "not reloaded")
    for message in ("one", "two", "one", "bad: line 1 column 2 (char 1)", "bad: line 3 column 4 (char 9)"):
        faults_.report(ConfigError(message, hint="do"))
    assert [record.message for record in caplog.records] == [
        "not reloaded: one (hint: do)",
        "not reloaded: two (hint: do)",
        "not reloaded: bad: line 1 column 2 (char 1) (hint: do)",
    ]
    faults_.clear()
    faults_.report(ConfigError("one"))
    assert caplog.records[-1].message == "not reloaded: one"


def test_faults_without_end_fill_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    faults_ = FaultLog(logging.getLogger("t"), "not reloaded")
    for number in range(1000):
        faults_.report(ConfigError(f"fault {number}"))
    assert len(caplog.records) == 100
