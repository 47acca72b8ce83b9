"""The simulator agrees with queueing theory where theory has an answer, loses nothing, and repeats itself by seed."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from ovms_lora.scale.plan.adapter_tiers import Tier
from ovms_lora.scale.plan.outcome import Outcome
from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.simulation import Routing, Simulated, simulate
from tests.scale.plan.profiles import e2e, flat, limits, load, profile, ttft


def erlang_c(servers: int, offered: float) -> float:
    """Return the probability that a request waits, with `offered` Erlang on so many servers (Erlang's C formula)."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


def che_hit_rate(shares: NDArray[np.float64], size: int) -> float:
    """Return the hit rate of an LRU cache of `size` items (Che, Tung and Wang, 2002)."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-shares * middle).sum() < size else (low, middle)
    return float((shares * -np.expm1(-shares * low)).sum())


def test_one_row_of_fixed_work_waits_as_in_an_m_d_1_queue() -> None:
    service, use = 1.0, 0.7
    # One prompt step and nine more of 0.1 s each; one request at a time.
    workload = load(use / service, prompts="8", outputs="10", base_share=1.0)
    one = limits(max_num_seqs=1, max_ongoing_requests=10**6)
    done = simulate(flat(0.1), one, workload.draw(30_000, 3), replicas=1, routing=Routing.AFFINITY)
    waiting = use * service / (2 * (1 - use))  # Pollaczek-Khinchine
    assert e2e(done).mean() - service == pytest.approx(waiting, rel=0.06)
    assert e2e(done).min() == pytest.approx(service)


@pytest.mark.parametrize("routing", Routing)
def test_replicas_of_one_row_wait_together_as_in_an_m_m_c_queue(routing: Routing) -> None:
    servers, offered, mean = 4, 3.0, 1.0
    workload = load(offered / mean, prompts="1", outputs="exp:400", base_share=1.0)
    one = limits(max_num_seqs=1, max_ongoing_requests=1)
    done = simulate(flat(mean / 400), one, workload.draw(30_000, 5), replicas=servers, routing=routing)
    waiting = erlang_c(servers, offered) * mean / (servers - offered)
    assert ttft(done).mean() == pytest.approx(waiting, rel=0.08)
    assert e2e(done).mean() == pytest.approx(waiting + mean, rel=0.05)


def test_rows_of_one_replica_wait_as_in_an_m_m_c_queue_when_steps_cost_the_same() -> None:
    rows, offered, mean = 4, 3.0, 1.0
    workload = load(offered / mean, prompts="1", outputs="exp:400", base_share=1.0)
    batch = limits(max_num_seqs=rows, max_ongoing_requests=10**6)
    done = simulate(flat(mean / 400, rows=rows), batch, workload.draw(30_000, 5), replicas=1, routing=Routing.AFFINITY)
    assert e2e(done).mean() - mean == pytest.approx(erlang_c(rows, offered) * mean / (rows - offered), rel=0.08)


@pytest.mark.parametrize(("tier", "size"), [("resident", 16), ("host", 50)])
def test_adapters_are_found_as_ches_approximation_says(tier: str, size: int) -> None:
    workload = load(0.1, adapters=200, zipf=0.9, prompts="1", outputs="1")
    few = limits(max_loras=16, total_rank=16 * 16, max_cpu_loras=50)
    done = simulate(flat(0.001, rows=16), few, workload.draw(30_000, 1), replicas=1, routing=Routing.AFFINITY)
    hits = Outcome.of(done, Routing.AFFINITY, capacity=16, overhead=0.0).hits
    found = hits.resident if tier == "resident" else hits.resident + hits.host
    assert found == pytest.approx(che_hit_rate(workload.popularity.shares, size), abs=0.015)


def run(routing: Routing, seed: int = 0, *, rate: float = 12.0) -> Simulated:
    traffic = load(rate, base_share=0.1).draw(4000, seed)
    return simulate(profile(), limits(), traffic, replicas=5, routing=routing, seed=seed)


@pytest.mark.parametrize("routing", Routing)
def test_every_request_is_answered_in_the_order_of_its_tokens(routing: Routing) -> None:
    done = run(routing)
    first, last = ttft(done), e2e(done)
    assert np.isfinite(last).all()
    assert (first > 0).all()
    single = np.array(done.traffic.outputs) == 1
    assert (last[single] == first[single]).all()
    assert (last[~single] > first[~single]).all()
    tiers = np.array(done.record.tiers)
    assert ((tiers == Tier.BASE) == (np.array(done.traffic.adapters) == -1)).all()


@pytest.mark.parametrize("routing", Routing)
def test_no_answer_is_quicker_than_its_own_steps_and_no_replica_busier_than_time(routing: Routing) -> None:
    done = run(routing)
    outputs = np.array(done.traffic.outputs)
    assert (e2e(done) - ttft(done) >= (outputs - 1) * 0.0209).all()
    assert all(0 < busy <= max(done.record.done) for busy in done.busy_seconds)


def test_the_same_seed_repeats_a_simulation_and_another_does_not() -> None:
    once, again, other = run(Routing.AFFINITY), run(Routing.AFFINITY), run(Routing.AFFINITY, seed=1)
    assert once.record == again.record
    assert once.busy_seconds == again.busy_seconds
    assert once.record.done != other.record.done


def test_affinity_finds_more_adapters_in_the_graph_than_random_routing_and_answers_sooner() -> None:
    found = {routing: run(routing) for routing in Routing}
    outcomes = {r: Outcome.of(done, r, capacity=80, overhead=0.0) for r, done in found.items()}
    near, far = outcomes[Routing.AFFINITY], outcomes[Routing.RANDOM]
    assert near.hits.resident > far.hits.resident + 0.2
    assert near.ttft.p95 < far.ttft.p95
    assert near.hits.resident + near.hits.host + near.hits.disk == pytest.approx(1)


def test_adapters_that_take_the_whole_rank_run_one_after_another() -> None:
    two = Popularity.zipf(2, 0.0, rank=16)
    traffic = load(1000.0, popularity=two, prompts="1", outputs="10").draw(40, 0)
    tight = limits(total_rank=16, max_loras=8)
    done = simulate(flat(0.1, rows=16), tight, traffic, replicas=1, routing=Routing.AFFINITY)
    spans = [
        (first, last, adapter)
        for first, last, adapter in zip(done.record.first, done.record.done, traffic.adapters, strict=True)
    ]
    clashes = [1 for a in spans for b in spans if a[2] != b[2] and a[0] < b[1] - 1e-9 and b[0] < a[1] - 1e-9]
    assert not clashes


def test_one_load_serves_all_who_wait_for_it() -> None:
    only = Popularity.zipf(1, 0.0, rank=16)
    traffic = load(1000.0, popularity=only, prompts="1", outputs="1").draw(10, 0)
    slow = flat(0.001, rows=16, load_seconds=5.0)
    done = simulate(slow, limits(), traffic, replicas=1, routing=Routing.AFFINITY)
    assert done.record.tiers == [Tier.DISK] * 10
    assert max(done.record.done) < 5.2


def test_an_overload_is_said() -> None:
    done = run(Routing.AFFINITY, rate=200.0)
    assert Outcome.of(done, Routing.AFFINITY, capacity=80, overhead=0.0).overloaded
    assert not Outcome.of(run(Routing.AFFINITY), Routing.AFFINITY, capacity=80, overhead=0.0).overloaded


def test_ten_thousand_adapters_on_a_thousand_replicas_take_seconds() -> None:
    traffic = load(2000.0, adapters=10_000).draw(20_000, 0)
    begin = time.process_time()
    done = simulate(profile(), limits(), traffic, replicas=1000, routing=Routing.AFFINITY)
    assert time.process_time() - begin < 15
    assert np.isfinite(e2e(done)).all()
