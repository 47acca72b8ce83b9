"""A replica beside a ledger that has started again and knows less than it."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from ovms_lora.core.errors import EngineError
from ovms_lora.scale import follower
from ovms_lora.scale.changes import Change, ChangeKind, ChangeLog, History
from ovms_lora.scale.follower import LedgerFollower

pytestmark = pytest.mark.anyio


class Ledger:
    """The ledger's side, without Ray."""

    def __init__(self) -> None:
        self.log = ChangeLog()
        self.asked = 0

    async def since(self, version: int) -> History:
        self.asked += 1
        while self.log.version == version:
            await asyncio.sleep(0.001)
        return self.log.since(version)

    async def learn(self, history: History) -> None:
        self.log.go_on_from(history)


def unload(alias: str) -> Change:
    return Change(ChangeKind.UNLOAD, alias)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(follower, "_AGAIN_SECONDS", 0.01)
    return Ledger()


async def test_a_ledger_that_has_forgotten_is_told_and_nothing_is_missed(ledger: Ledger) -> None:
    unloaded = mock.AsyncMock()
    server = mock.Mock(adapters=mock.Mock(unload=unloaded))
    following = LedgerFollower(server, ledger.since, ledger.learn)
    for alias in "ab":
        ledger.log.add(unload(alias))
    await following.start()
    await following.reach(2)
    ledger.log, ledger.asked = ChangeLog(), 0
    ledger.log.add(unload("c"))  # a client's, before anybody has told the new ledger
    async with asyncio.timeout(5):
        await following.reach(3)
    assert [call.args[0] for call in unloaded.await_args_list] == ["a", "b", "c"]
    assert ledger.asked < 20
    await following.stop()


async def test_it_is_seen_when_it_follows_no_more(ledger: Ledger) -> None:
    unloaded = mock.AsyncMock()
    server = mock.Mock(adapters=mock.Mock(unload=unloaded))
    following = LedgerFollower(server, ledger.since, ledger.learn)
    ledger.log.add(unload("a"))
    await following.start()
    following.check()
    unloaded.side_effect = RuntimeError
    ledger.log.add(unload("b"))
    async with asyncio.timeout(5):
        while following._task and not following._task.done():
            await asyncio.sleep(0.001)
    with pytest.raises(EngineError, match="does not follow"):
        following.check()
