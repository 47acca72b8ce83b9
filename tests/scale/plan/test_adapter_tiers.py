"""Adapters leave graph and host memory least recently used first, and never while somebody has them."""

from __future__ import annotations

from ovms_lora.scale.plan.adapter_tiers import AdapterTiers


def tiers(*, ranks: list[int] | None = None, lost: list[int] | None = None, total_rank: int = 64) -> AdapterTiers:
    gone = lost if lost is not None else []
    return AdapterTiers(ranks or [16] * 10, gone.append, max_loras=2, max_cpu_loras=3, total_rank=total_rank)


def use(of: AdapterTiers, adapter: int) -> bool | None:
    of.ask(adapter)
    found = of.acquire(adapter)
    if found is not None:
        of.release(adapter)
    return found


def test_the_least_recently_used_idle_adapter_leaves_the_graph() -> None:
    lost: list[int] = []
    some = tiers(lost=lost)
    assert [use(some, adapter) for adapter in (0, 1, 0, 2)] == [False, False, True, False]
    assert lost == [1]
    assert list(some.resident) == [0, 2]


def test_adapters_that_run_stay_in_the_graph() -> None:
    some = tiers()
    for adapter in (0, 1):
        some.ask(adapter)
        assert some.acquire(adapter) is False
    some.ask(2)
    assert some.acquire(2) is None
    some.release(0)
    assert some.acquire(2) is False


def test_large_ranks_push_out_as_many_as_they_need() -> None:
    some = tiers(ranks=[16, 16, 32], total_rank=32)
    assert [use(some, adapter) for adapter in (0, 1, 2)] == [False, False, False]
    assert list(some.resident) == [2]


def test_host_memory_holds_the_last_used_and_what_is_resident() -> None:
    some = tiers()
    for adapter in range(5):
        use(some, adapter)
    # 2, 3 and 4 by use; 3 and 4 are resident too.
    assert [some.in_memory(adapter) for adapter in range(5)] == [False, False, True, True, True]


def test_an_adapter_that_is_asked_for_is_not_reported_lost() -> None:
    lost: list[int] = []
    some = tiers(lost=lost)
    use(some, 0)
    some.ask(0)
    use(some, 1)
    use(some, 2)
    assert 0 not in some.resident
    assert lost == []
    assert some.in_memory(0)
