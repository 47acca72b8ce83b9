"""The log of what clients have changed: of each alias the last change, in order."""

from __future__ import annotations

from ovms_lora.scale.changes import MAX_UNLOADED, Change, ChangeKind, ChangeLog, History, newest
from ovms_lora.server.adapter_updates import NewAdapter


def load(alias: str) -> Change:
    return Change(ChangeKind.LOAD, alias, NewAdapter(alias=alias, path=f"/loras/{alias}", replace=True))


def unload(alias: str) -> Change:
    return Change(ChangeKind.UNLOAD, alias)


def told(history: History) -> list[tuple[int, str, str]]:
    return [(version, change.kind, change.alias) for version, change in history.changes]


def test_of_an_alias_only_the_last_change_counts() -> None:
    log = ChangeLog()
    for change in (load("sql"), load("mail"), unload("sql"), Change(ChangeKind.RELOAD), load("mail")):
        log.add(change)
    assert told(log.since(0)) == [(3, "unload", "sql"), (4, "reload", ""), (5, "load", "mail")]
    assert log.since(0).version == 5


def test_who_has_seen_a_part_gets_the_rest() -> None:
    log = ChangeLog()
    for alias in "abc":
        log.add(load(alias))
    assert told(log.since(2)) == [(3, "load", "c")]
    assert log.since(3) == History(3)


def test_a_copy_goes_on_where_the_log_was() -> None:
    log, copy = ChangeLog(), ChangeLog()
    for alias in "abc":
        log.add(load(alias))
    log.add(unload("b"))
    copy.take(log.since(0))
    assert copy.since(0) == log.since(0)
    assert copy.add(load("d")) == 5
    copy.take(log.since(0))
    assert copy.version == 5


def test_a_shorter_log_goes_on_from_a_longer_one() -> None:
    longer, log = ChangeLog(), ChangeLog()
    for alias in "abc":
        longer.add(load(alias))
    for change in (unload("b"), load("d")):
        log.add(change)
    log.go_on_from(longer.since(0))
    assert told(log.since(0)) == [(1, "load", "a"), (3, "load", "c"), (4, "unload", "b"), (5, "load", "d")]
    assert log.version == 5


def test_the_fullest_copy_is_taken() -> None:
    assert newest([History(1), History(3), History(2)]) == History(3)
    assert newest([]) == History(0)


def test_unloaded_aliases_are_forgotten_in_the_end() -> None:
    log = ChangeLog()
    log.add(load("kept"))
    for number in range(MAX_UNLOADED + 10):
        log.add(unload(f"a{number}"))
    assert len(log.since(0).changes) == MAX_UNLOADED + 1
    assert log.since(0).changes[1][1].alias == "a10"
