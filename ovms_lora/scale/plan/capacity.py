"""The plan: how many replicas meet the goals, with either routing, and what each number comes to.

More replicas never make latencies worse, up to chance. So the number is found between the fewest that could compute
the load at all and the first number that meets the goals, growing by halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ovms_lora.scale.plan.outcome import Goal, Outcome
from ovms_lora.scale.plan.replica import ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.simulation import Routing, simulate
from ovms_lora.scale.plan.step_costs import StepCosts
from ovms_lora.scale.plan.workload import Workload

_REQUESTS = 20_000
_REQUESTS_PER_REPLICA = 200


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load on one kind of replica. `requests` None is 20,000, or 200 a replica where that is more."""

    profile: ReplicaProfile
    limits: ReplicaLimits
    workload: Workload
    requests: int | None = None
    seed: int = 0
    said: Callable[[str], None] = field(default=lambda _: None)

    def outcome(self, replicas: int, routing: Routing) -> Outcome:
        """Simulate so many replicas. Raises PlanError when the profile does not reach so far."""
        self.said(f"simulating {replicas} replicas, {routing} routing")
        requests = self.requests or max(_REQUESTS, _REQUESTS_PER_REPLICA * replicas)
        traffic = self.workload.draw(requests, self.seed)
        simulated = simulate(self.profile, self.limits, traffic, replicas=replicas, routing=routing, seed=self.seed)
        capacity = replicas * self.limits.max_ongoing_requests
        return Outcome.of(simulated, routing, capacity=capacity, overhead=self.profile.overhead_seconds)

    @property
    def fewest(self) -> int:
        """A number of replicas below which the load cannot be computed: all adapters resident, batches full."""
        decode = StepCosts.of(self.profile, rows=self.limits.max_num_seqs, adapters=0, tokens=0).decode
        per_token = min(seconds[0] / rows for rows, seconds in enumerate(decode) if rows)
        return max(1, math.ceil(self.workload.rate * self.workload.outputs.mean * per_token))


def replicas_needed(
    scenario: Scenario, goals: Sequence[Goal], routing: Routing, *, max_replicas: int
) -> Outcome | None:
    """Return the outcome of the fewest replicas that meet all goals; None when `max_replicas` do not."""

    def meeting(replicas: int) -> Outcome | None:
        outcome = scenario.outcome(replicas, routing)
        return outcome if all(goal.is_met(outcome) for goal in goals) else None

    failing, replicas = 0, min(scenario.fewest, max_replicas)
    found = meeting(replicas)
    while found is None:
        if replicas == max_replicas:
            return None
        failing, replicas = replicas, min(max_replicas, math.ceil(replicas * 1.5))
        found = meeting(replicas)
    # Below `fewest` nothing can meet a goal; large numbers are found to 1 %.
    failing = max(failing, scenario.fewest - 1)
    while found.replicas - failing > max(1, found.replicas // 100):
        middle = (found.replicas + failing) // 2
        better = meeting(middle)
        found, failing = (better, failing) if better else (found, middle)
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas needed by routing (None: more than were allowed; empty without goals), and outcomes worth comparing."""

    needed: dict[Routing, int | None]
    outcomes: tuple[Outcome, ...]


def plan(scenario: Scenario, goals: Sequence[Goal], *, replicas: int | None, max_replicas: int) -> Plan:
    """Compare both routings with `replicas`, or find how many each needs for the goals."""
    if replicas is not None:
        return Plan({}, tuple(scenario.outcome(replicas, routing) for routing in Routing))
    found = {routing: replicas_needed(scenario, goals, routing, max_replicas=max_replicas) for routing in Routing}
    best = found[Routing.AFFINITY] or scenario.outcome(max_replicas, Routing.AFFINITY)
    outcomes = [best]
    other = found[Routing.RANDOM]
    if other is None or other.replicas != best.replicas:
        outcomes.append(scenario.outcome(best.replicas, Routing.RANDOM))
    if other is not None:
        outcomes.append(other)
    return Plan({routing: outcome.replicas if outcome else None for routing, outcome in found.items()}, tuple(outcomes))
