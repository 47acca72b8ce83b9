"""SimulatedFleet: which replicas have room, which hold an adapter, which hold fewest: what the routing policy asks.

Kept up to date by every change, so that an answer costs the same for two replicas and for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Drawn:
    """A set whose members can be drawn by index."""

    __slots__ = ("_places", "members")

    def __init__(self) -> None:
        self.members: list[int] = []
        self._places: dict[int, int] = {}

    def add(self, member: int) -> None:
        self._places[member] = len(self.members)
        self.members.append(member)

    def remove(self, member: int) -> None:
        place, last = self._places.pop(member), self.members.pop()
        if last != member:
            self.members[place] = last
            self._places[last] = place


class SimulatedFleet:
    """Replicas by number; each takes `max_ongoing` requests at once."""

    def __init__(self, replicas: int, adapters: int, *, max_ongoing: int) -> None:
        self._max_ongoing = max_ongoing
        self._ongoing = [0] * replicas
        self._held: list[dict[int, None]] = [{} for _ in range(replicas)]
        # All below are about replicas with room only.
        self._room = _Drawn()
        self._holders = [_Drawn() for _ in range(adapters)]
        self._by_count: dict[int, _Drawn] = {0: _Drawn()}
        for replica in range(replicas):
            self._room.add(replica)
            self._by_count[0].add(replica)

    def holders(self, adapter: int) -> Sequence[int]:
        """Return the replicas with room that hold an adapter."""
        return self._holders[adapter].members

    def with_fewest_adapters(self) -> Sequence[int]:
        """Return the replicas with room that hold as few adapters as any of these."""
        return self._by_count[min(self._by_count)].members if self._by_count else ()

    def with_room(self) -> Sequence[int]:
        """Return the replicas with room."""
        return self._room.members

    def ongoing(self, replica: int) -> int:
        """Return how many requests a replica has."""
        return self._ongoing[replica]

    def sent(self, replica: int, adapter: int | None) -> None:
        """Note that a request was sent to a replica with room; it holds the adapter from now on."""
        if adapter is not None and adapter not in self._held[replica]:
            self._leave_count(replica)
            self._held[replica][adapter] = None
            self._join_count(replica)
            self._holders[adapter].add(replica)
        self._ongoing[replica] += 1
        if self._ongoing[replica] == self._max_ongoing:
            self._room.remove(replica)
            self._leave_count(replica)
            for held in self._held[replica]:
                self._holders[held].remove(replica)

    def ended(self, replica: int) -> None:
        """Note that a request of a replica has ended."""
        if self._ongoing[replica] == self._max_ongoing:
            self._room.add(replica)
            self._join_count(replica)
            for held in self._held[replica]:
                self._holders[held].add(replica)
        self._ongoing[replica] -= 1

    def lost(self, replica: int, adapter: int) -> None:
        """Note that a replica does not hold an adapter any more."""
        has_room = self._ongoing[replica] < self._max_ongoing
        if has_room:
            self._leave_count(replica)
            self._holders[adapter].remove(replica)
        del self._held[replica][adapter]
        if has_room:
            self._join_count(replica)

    def _leave_count(self, replica: int) -> None:
        count = len(self._held[replica])
        self._by_count[count].remove(replica)
        if not self._by_count[count].members:
            del self._by_count[count]

    def _join_count(self, replica: int) -> None:
        self._by_count.setdefault(len(self._held[replica]), _Drawn()).add(replica)
