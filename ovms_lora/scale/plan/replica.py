"""SimulatedReplica: one engine as the planner sees it: steps, the rows in them, and where its adapters are.

    arrive ──► (disk: loaded one after another) ──► waiting ──► filling ──► decoding ──► done
                                                       adapter resident       one token a step

A step takes one token of each decoding row and then prompt tokens, up to `max_num_batched_tokens`; an adapter that is
brought in delays it. Steps with prompt tokens are simulated one by one. Steps that only decode are taken together, up
to the next end of a row, and cut short at a step's end when something arrives. Waiting requests are taken in the order
of arrival; one whose adapter has no room is passed a bounded number of times, as by the engine's scheduler.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ovms_lora.scale.plan.adapter_tiers import AdapterTiers, Tier
from ovms_lora.scale.plan.agenda import Agenda
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.step_costs import StepCosts
from ovms_lora.scale.plan.workload import BASE, Traffic

_MAX_BYPASSES = 64  # as SchedulerLimits


@dataclass(frozen=True, slots=True)
class ReplicaLimits:
    """How each replica is set up: the server's options of the same names. The router sends `max_ongoing_requests`."""

    max_loras: int
    max_cpu_loras: int
    total_rank: int
    max_num_seqs: int
    max_ongoing_requests: int


@dataclass(frozen=True, slots=True)
class Record:
    """What became of each request: seconds of first and last token since the start, and where its adapter was."""

    first: list[float]
    done: list[float]
    tiers: list[Tier]

    @classmethod
    def of(cls, requests: int) -> Record:
        """Return a record of nothing yet."""
        return cls([math.nan] * requests, [math.nan] * requests, [Tier.BASE] * requests)


class SimulatedReplica:
    """One replica; `finished` is told of requests that end, before the next step begins."""

    __slots__ = (
        "_agenda",
        "_begun",
        "_bypassed",
        "_costs",
        "_decoding",
        "_filled",
        "_filling",
        "_finished",
        "_limits",
        "_loader_free",
        "_loading",
        "_plan",
        "_position",
        "_profile",
        "_record",
        "_running",
        "_step",
        "_steps",
        "_tiers",
        "_traffic",
        "_waiting",
        "busy_seconds",
        "number",
    )

    def __init__(
        self,
        number: int,
        profile: ReplicaProfile,
        costs: StepCosts,
        limits: ReplicaLimits,
        traffic: Traffic,
        record: Record,
        agenda: Agenda,
        finished: Callable[[SimulatedReplica, list[int], float], None],
        lost: Callable[[int], None],
    ) -> None:
        self.number = number
        self.busy_seconds = 0.0
        self._profile, self._costs, self._limits = profile, costs, limits
        self._traffic, self._record, self._agenda, self._finished = traffic, record, agenda, finished
        self._tiers = AdapterTiers(
            traffic.ranks,
            lost,
            max_loras=limits.max_loras,
            max_cpu_loras=limits.max_cpu_loras,
            total_rank=limits.total_rank,
        )
        self._loading: dict[int, list[int]] = {}  # adapter → requests that wait for it
        self._loader_free = 0.0
        self._waiting: deque[int] = deque()
        self._bypassed: dict[int, int] = {}
        self._filling: deque[tuple[int, int]] = deque()  # request, prompt tokens left
        self._filled: list[int] = []  # whose prompt ends with this step
        self._decoding: list[tuple[int, int]] = []  # heap of position of the last token, request
        self._running: dict[int, int] = {}  # adapter → rows
        self._position = 0  # steps done
        self._plan = 0  # the number of the plan that counts; earlier ones were cut short
        self._steps = 0  # 0: idle
        self._step = self._begun = 0.0

    def arrive(self, request: int, now: float) -> None:
        """Take a request in; `wake` comes after."""
        adapter = self._traffic.adapters[request]
        if adapter == BASE:
            self._waiting.append(request)
        elif self._tiers.in_memory(adapter):
            self._tiers.ask(adapter)
            self._waiting.append(request)
        elif adapter in self._loading:
            self._loading[adapter].append(request)
        else:
            self._loading[adapter] = [request]
            self._loader_free = max(now, self._loader_free) + self._profile.load_seconds * self._size(adapter)
            self._agenda.add(self._loader_free, self._loaded, adapter)

    def wake(self, now: float) -> None:
        """Have what waits looked at: now, or at the end of the step that runs."""
        if not self._waiting:
            return
        if not self._steps:
            self.begin(now)
        elif self._steps > 1 and len(self._decoding) < self._limits.max_num_seqs:
            done = max(1, math.ceil((now - self._begun) / self._step))
            if done < self._steps:
                self._schedule(done)

    def begin(self, now: float) -> None:
        """Begin the next step, or several that only decode."""
        stall = self._admit()
        rows, adapters = len(self._decoding), min(len(self._running), len(self._costs.decode[0]) - 1)
        tokens = self._fill(self._profile.max_num_batched_tokens - rows)
        self._begun = now
        if tokens:
            self._step = stall + self._costs.mixed(rows, adapters, tokens)
            self._schedule(1)
        elif rows:
            self._step = self._costs.decode[rows][min(adapters, rows)]
            self._schedule(self._decoding[0][0] - self._position)

    def _schedule(self, steps: int) -> None:
        self._steps = steps
        self._plan += 1
        self._agenda.add(self._begun + steps * self._step, self._turn, self._plan)

    def _turn(self, plan: int, now: float) -> None:
        """End the steps of a plan and begin the next ones."""
        if plan != self._plan:
            return
        self.busy_seconds += self._steps * self._step
        self._position += self._steps
        self._steps = 0
        ended = self._ended(now)
        if ended:
            self._finished(self, ended, now)
        self.begin(now)

    def _ended(self, now: float) -> list[int]:
        """Take out the rows whose last token has come, and let those with a whole prompt decode."""
        ended = []
        while self._decoding and self._decoding[0][0] <= self._position:
            ended.append(heapq.heappop(self._decoding)[1])
        for request in self._filled:
            self._record.first[request] = now
            more = self._traffic.outputs[request] - 1
            if more:
                heapq.heappush(self._decoding, (self._position + more, request))
            else:
                ended.append(request)
        self._filled.clear()
        for request in ended:
            self._record.done[request] = now
            self._let_go(self._traffic.adapters[request])
        return ended

    def _let_go(self, adapter: int) -> None:
        if adapter == BASE:
            return
        self._tiers.release(adapter)
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]

    def _admit(self) -> float:
        """Admit what fits; return the seconds that bringing in adapters takes."""
        if not self._waiting:
            return 0.0
        stall = 0.0
        passed: list[int] = []
        running = len(self._decoding) + len(self._filling)
        budget = self._profile.max_num_batched_tokens - len(self._decoding) - sum(left for _, left in self._filling)
        while self._waiting and running < self._limits.max_num_seqs and budget > 0:
            request = self._waiting.popleft()
            adapter = self._traffic.adapters[request]
            if adapter != BASE:
                was_there = self._tiers.acquire(adapter)
                if was_there is None:
                    passed.append(request)
                    if self._bypassed.get(request, 0) >= _MAX_BYPASSES:
                        break
                    continue
                self._running[adapter] = self._running.get(adapter, 0) + 1
                stall += 0.0 if was_there else self._profile.bring_in_seconds * self._size(adapter)
                self._found(request, Tier.RESIDENT if was_there else Tier.HOST)
            self._note_bypasses(request, passed)
            self._filling.append((request, self._traffic.prompts[request]))
            running += 1
            budget -= self._traffic.prompts[request]
        self._waiting.extendleft(reversed(passed))
        return stall

    def _note_bypasses(self, admitted: int, passed: list[int]) -> None:
        self._bypassed.pop(admitted, None)
        for older in passed:
            self._bypassed[older] = self._bypassed.get(older, 0) + 1

    def _fill(self, budget: int) -> int:
        """Take prompt tokens, oldest prompt first; return how many."""
        taken = 0
        while self._filling and taken < budget:
            request, left = self._filling[0]
            part = min(left, budget - taken)
            taken += part
            if part < left:
                self._filling[0] = (request, left - part)
            else:
                self._filling.popleft()
                self._filled.append(request)
        return taken

    def _loaded(self, adapter: int, now: float) -> None:
        for request in self._loading.pop(adapter):
            self._record.tiers[request] = Tier.DISK
            self._tiers.ask(adapter)
            self._waiting.append(request)
        self.wake(now)

    def _found(self, request: int, tier: Tier) -> None:
        self._record.tiers[request] = max(self._record.tiers[request], tier)

    def _size(self, adapter: int) -> float:
        """The rank of an adapter, measured ones having 1."""
        return self._traffic.ranks[adapter] / self._profile.rank
