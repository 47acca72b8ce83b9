"""The plan has the fewest replicas that meet the goals, and affinity needs no more of them than random routing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ovms_lora.core.errors import PlanError, UsageError
from ovms_lora.scale.plan.capacity import Scenario, plan, replicas_needed
from ovms_lora.scale.plan.memory import MemoryUse, fitted
from ovms_lora.scale.plan.outcome import Goal
from ovms_lora.scale.plan.simulation import Routing
from tests.scale.plan.profiles import limits, load, profile

SCENARIO = Scenario(profile(), limits(), load(12.0), requests=2000)
GOAL = Goal.parse("ttft_p95=0.25")


def test_one_replica_less_misses_the_goal() -> None:
    found = replicas_needed(SCENARIO, [GOAL], Routing.AFFINITY, max_replicas=50)
    assert found
    assert GOAL.is_met(found)
    assert found.replicas > SCENARIO.fewest
    assert not GOAL.is_met(SCENARIO.outcome(found.replicas - 1, Routing.AFFINITY))


def test_a_plan_compares_both_routings_at_the_number_that_affinity_needs() -> None:
    found = plan(SCENARIO, [GOAL], replicas=None, max_replicas=50)
    near, far = found.needed[Routing.AFFINITY], found.needed[Routing.RANDOM]
    assert near
    assert far
    assert near < far
    assert [(o.routing, o.replicas) for o in found.outcomes] == [
        (Routing.AFFINITY, near),
        (Routing.RANDOM, near),
        (Routing.RANDOM, far),
    ]


def test_a_goal_below_what_one_prompt_takes_is_met_by_no_number() -> None:
    found = plan(SCENARIO, [Goal.parse("ttft_p50=0.001")], replicas=None, max_replicas=4)
    assert found.needed == {Routing.AFFINITY: None, Routing.RANDOM: None}
    assert [(o.routing, o.replicas) for o in found.outcomes] == [(Routing.AFFINITY, 4), (Routing.RANDOM, 4)]


def test_a_given_number_is_simulated_as_it_is() -> None:
    found = plan(SCENARIO, [], replicas=3, max_replicas=50)
    assert not found.needed
    assert [(o.routing, o.replicas) for o in found.outcomes] == [(Routing.AFFINITY, 3), (Routing.RANDOM, 3)]


@pytest.mark.parametrize("text", ["ttft", "ttft_p95", "ttft_p90=1", "e2e_p95=0", "e2e_p95=-1", "itl_p95=1"])
def test_goals_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a bound on a latency"):
        Goal.parse(text)


def test_memory_is_the_sum_of_its_parts() -> None:
    used = MemoryUse.of(profile(), limits(), load(1.0, prompts="100", outputs="50"))
    assert used == MemoryUse(10**9, 16 * 150 * 10**4, 192 * 10**6, 64 * 10**7)
    assert used.total == 10**9 + 24 * 10**6 + 192 * 10**6 + 64 * 10**7


def test_host_adapters_take_the_memory_that_is_left() -> None:
    workload = load(1.0, prompts="100", outputs="50", adapters=500)
    open_limits = limits(max_cpu_loras=0)
    assert fitted(profile(), open_limits, workload, None).max_cpu_loras == 64
    assert fitted(profile(), open_limits, workload, 2e9).max_cpu_loras == 78
    assert fitted(profile(), open_limits, load(1.0, adapters=20), 20e9).max_cpu_loras == 20


def test_memory_that_does_not_suffice_is_an_error_that_says_what_does() -> None:
    workload = load(1.0, prompts="100", outputs="50", adapters=500)
    with pytest.raises(PlanError, match=r"100 adapters in host memory do not fit into 2\.00 GB") as caught:
        fitted(profile(), limits(max_cpu_loras=100), workload, 2e9)
    assert "--max_cpu_loras 78 fits" in (caught.value.hint or "")
    with pytest.raises(PlanError, match="without adapters in host memory"):
        fitted(profile(), limits(), workload, 1e9)


def test_more_rank_in_the_graph_finds_more_adapters_there() -> None:
    few = replace(SCENARIO, limits=limits(max_loras=2, total_rank=32))
    at_few, at_many = few.outcome(5, Routing.AFFINITY), SCENARIO.outcome(5, Routing.AFFINITY)
    assert at_few.hits.resident < at_many.hits.resident
