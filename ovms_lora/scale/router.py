"""AdapterRouter: Ray Serve's request router for replicas that hold adapters.

Owns nothing but the joints: Serve says which replicas there are, how long their queues are and where a request went;
`Holdings` remembers, `routing_policy` prefers. The multiplexed model id of a request names its adapters.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ovms_lora.scale.holdings import Holdings
from ovms_lora.scale.routing_policy import KnownReplicas, preferences


class AdapterRouter(RequestRouter):
    """Prefers a holder with room, then the replica with the fewest adapters, then the less loaded of two."""

    def initialize_state(self, **settings: Any) -> None:
        """Take `request_router_kwargs`: `target_ongoing_requests` is how many requests leave a replica no room."""
        self._holdings = Holdings(settings["target_ongoing_requests"])
        self._rng = random.Random()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return ranks of one replica, the best one first; Serve takes the first that accepts.

        Of a rank of several Serve would choose by lengths of queues that are behind when many requests come at once.
        """
        # Begun anywhere: of equal replicas the first one is taken.
        begin = self._rng.randrange(len(candidate_replicas))
        turned = candidate_replicas[begin:] + candidate_replicas[:begin]
        replicas = {replica.replica_id.unique_id: replica for replica in turned}
        for name, replica in replicas.items():
            self._holdings.report(name, replica.routing_stats)
        key = self._key(pending_request)
        lengths = {name: self._queue_length(replica.replica_id) for name, replica in replicas.items()}
        states = KnownReplicas(self._holdings.states(key, lengths))
        ranks = preferences(states, key or None, self._rng)
        chosen = list(dict.fromkeys(state.replica_id for rank in ranks for state in rank))
        if chosen and key:
            # Before it is sent: requests that come in the meantime must not bring the adapter in elsewhere.
            self._holdings.believe(chosen[0], key)
        if pending_request:
            if chosen:
                self._holdings.intend(chosen[0], pending_request.metadata.internal_request_id)
            pending_request.routing_context.should_backoff = True
        return [[replicas[name]] for name in chosen]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run now."""
        super().update_replicas(replicas)
        self._holdings.keep(replica.replica_id.unique_id for replica in replicas)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note where a request went."""
        del result
        name = replica_id.unique_id
        self._holdings.begin(name, pending_request.metadata.internal_request_id)
        if key := self._key(pending_request):
            self._holdings.believe(name, key)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a request has ended, however it did."""
        self._holdings.end(replica_id.unique_id, internal_request_id)

    def _key(self, request: PendingRequest | None) -> str:
        """Return the adapters that a request wants held; empty for a base."""
        key = request.metadata.multiplexed_model_id if request else ""
        return "" if self._holdings.is_model(key) else key

    def _queue_length(self, replica_id: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica_id) or 0
