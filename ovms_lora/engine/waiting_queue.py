"""WaitingQueue: the sequences that wait, which of them is next, and how many each owner has.

    returned     those that ran before, oldest first; they have had their turn and go first
    owners       a ── sql   ► a1 a3 a4      take turns; within an owner its adapters do
                 │ └─ tools ► a2
                 b ── sql   ► b1            admitted: a1 b1 a2 a3 a4

Turns are start-time fair queueing: who has had much waits for one that has had little, who comes back has no claim to
what it missed, and a flow alone is served in the order of arrival. Owners and adapters are finitely many, so nobody
starves. Belongs to the engine thread; the numbers may be read by others.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from ovms_lora.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much waits."""

    requests: int = 0
    sequences: int = 0


@dataclass(slots=True)
class _Flow:
    """Sequences of one owner and one adapter, in the order of arrival, and when it is their turn."""

    turn: int
    waiting: deque[Sequence] = field(default_factory=deque)


class _Owner:
    """The flows of one owner, and when it is the owner's turn."""

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.flows: dict[str, _Flow] = {}
        self._now = 0

    @property
    def next(self) -> _Flow | None:
        """The flow whose turn it is; None when nothing waits."""
        flows = (flow for flow in self.flows.values() if flow.waiting)
        return min(flows, key=lambda flow: (flow.turn, flow.waiting[0].arrival), default=None)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait; a flow that had nothing waiting begins now."""
        self.flows = {name: flow for name, flow in self.flows.items() if flow.waiting or flow.turn > self._now}
        flow = self.flows.setdefault(_flow_name(sequence), _Flow(self._now))
        flow.waiting.append(sequence)

    def admit(self, flow: _Flow) -> Sequence:
        """Take the first one of the flow whose turn it is."""
        self._now = max(self._now, flow.turn)
        self.turn += 1
        flow.turn += 1
        return flow.waiting.popleft()


class WaitingQueue:
    """Iterate over it for all waiting sequences, in no particular order."""

    def __init__(self) -> None:
        self._returned: list[Sequence] = []
        self._owners: dict[str, _Owner] = {}
        self._now = 0
        self._arrivals = 0
        self._num_sequences = 0
        self._sequences_of_request: Counter[str] = Counter()
        self._requests_of: Counter[str] = Counter()  # by owner
        self._sequences_of: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for owner in self._owners.values():
            for flow in owner.flows.values():
                yield from flow.waiting

    @property
    def backlog(self) -> Backlog:
        """What waits; from any thread."""
        return Backlog(len(self._sequences_of_request), self._num_sequences)

    def backlog_of(self, owner: str) -> Backlog:
        """Return what of one owner waits; from any thread."""
        return Backlog(self._requests_of[owner], self._sequences_of[owner])

    @property
    def first(self) -> Sequence | None:
        """The next one; None when all are admitted or passed by."""
        if self._returned:
            return self._returned[0]
        flow = self._next_flow()
        return flow.waiting[0] if flow else None

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        sequence.arrival = self._arrivals
        self._arrivals += 1
        owner = self._owners.setdefault(sequence.request.owner, _Owner(self._now))
        if owner.next is None:
            owner.turn = max(owner.turn, self._now)
        owner.add(sequence)
        self._count(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that has had its turn wait again, before all that are younger."""
        sequence.had_turn = True
        self._return(sequence)
        self._count(sequence)

    def admit(self) -> Sequence:
        """Take the first one out: its turn has come. There must be one."""
        sequence = self._returned.pop(0) if self._returned else self._take_turn()
        sequence.had_turn = True
        self._forget(sequence)
        return sequence

    def _take_turn(self) -> Sequence:
        owner = self._next_owner()
        flow = owner.next if owner else None
        assert owner and flow, "nothing waits"
        self._now = max(self._now, owner.turn)
        return owner.admit(flow)

    def pass_by(self) -> Sequence:
        """Take the first one out for the moment, without its turn; `restore` it. There must be one."""
        flow = None if self._returned else self._next_flow()
        return flow.waiting.popleft() if flow else self._returned.pop(0)

    def restore(self, passed: Seq[Sequence]) -> None:
        """Put those that were passed by where they were."""
        for sequence in reversed(passed):
            if sequence.had_turn:
                self._return(sequence)
            else:
                self._flow_of(sequence).waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take one out that waits no longer."""
        (self._returned if sequence.had_turn else self._flow_of(sequence).waiting).remove(sequence)
        self._forget(sequence)

    def _return(self, sequence: Sequence) -> None:
        # Before its equals: of beams, which come together, the last one is preempted first.
        place = sum(1 for other in self._returned if other.arrival < sequence.arrival)
        self._returned.insert(place, sequence)

    def _next_owner(self) -> _Owner | None:
        heads = ((owner, owner.next) for owner in self._owners.values())
        waiting = [(owner.turn, flow.waiting[0].arrival, owner) for owner, flow in heads if flow]
        return min(waiting, key=lambda each: each[:2])[2] if waiting else None

    def _next_flow(self) -> _Flow | None:
        owner = self._next_owner()
        return owner.next if owner else None

    def _flow_of(self, sequence: Sequence) -> _Flow:
        return self._owners[sequence.request.owner].flows[_flow_name(sequence)]

    def _count(self, sequence: Sequence) -> None:
        request = sequence.request
        self._requests_of[request.owner] += not self._sequences_of_request[request.request_id]
        self._sequences_of_request[request.request_id] += 1
        self._sequences_of[request.owner] += 1
        self._num_sequences += 1

    def _forget(self, sequence: Sequence) -> None:
        request = sequence.request
        self._num_sequences -= 1
        _decrease(self._sequences_of, request.owner)
        _decrease(self._sequences_of_request, request.request_id)
        if request.request_id not in self._sequences_of_request:
            _decrease(self._requests_of, request.owner)


def _flow_name(sequence: Sequence) -> str:
    # A blend belongs to its first adapter: there are no more flows than adapters.
    adapters = sequence.request.adapters
    return adapters[0].digest if adapters else ""


def _decrease(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
