"""How Ray is told to run: variables of the environment that hold unless somebody has set them otherwise.

Imports nothing of Ray's, which reads most of them when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_RAY_ENVIRONMENT = {
    # Nothing goes out of the house unless somebody wants it to; and what serves is not less urgent than all else.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # A request takes the shortest way that Serve has: no change of thread in a process, and gRPC instead of objects.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # What may be large is bounded where requests are read; of 4 MiB, Serve's default, some answers have more.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}
_CLUSTER_ENVIRONMENT = {
    # Only for the processes of the cluster: whoever starts it has no event loop for a router.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Nobody can ask for Ray's own metrics, and collecting them takes from the replicas in every process.
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # Serve's default, ten looks a second at whether there is something to do, is a noticeable part of a small machine.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def prefer_ray_environment() -> None:
    """Tell Ray how to run, unless the environment says something else; before it is imported."""
    _prefer(_RAY_ENVIRONMENT)


def prefer_cluster_environment() -> None:
    """Tell the processes of a Ray that is about to be started how to run; once Ray is imported here."""
    _prefer(_CLUSTER_ENVIRONMENT)


def _prefer(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)
