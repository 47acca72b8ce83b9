"""Profiles, loads and limits for tests: simple enough that one knows what must come out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.replica import ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.simulation import Simulated
from ovms_lora.scale.plan.token_lengths import TokenLengths
from ovms_lora.scale.plan.workload import Workload

# As of a small model: a step costs 20 ms and a little for each row and each adapter.
REALISTIC: dict[str, Any] = {
    "model": "small",
    "rank": 16,
    "steps": [
        {"rows": rows, "adapters": adapters, "seconds": 0.02 + 0.001 * rows + 0.002 * adapters}
        for adapters in (0, 1, 2, 4, 8)
        for rows in (1, 2, 4, 8, 16)
        if adapters <= rows
    ],
    "prefill": [{"tokens": 16, "seconds": 0.03}, {"tokens": 256, "seconds": 0.2}],
    "bring_in_seconds": 0.01,
    "load_seconds": 0.05,
    "base_bytes": 10**9,
    "kv_bytes_per_token": 10**4,
    "resident_bytes_per_rank": 10**6,
    "host_bytes_per_adapter": 10**7,
}


def profile(**changes: Any) -> ReplicaProfile:
    return ReplicaProfile.model_validate(REALISTIC | changes, strict=False)


def flat(seconds: float, *, rows: int = 1, **changes: Any) -> ReplicaProfile:
    """Return a replica whose steps take the same time for any rows; prompts and adapters cost nothing."""
    places = {(count, adapters) for count in (1, rows) for adapters in (0, 1, count)}
    steps = [{"rows": count, "adapters": adapters, "seconds": seconds} for count, adapters in sorted(places)]
    free = {"steps": steps, "bring_in_seconds": 0.0, "load_seconds": 0.0}
    prefill = {"prefill": [{"tokens": 1, "seconds": seconds}, {"tokens": 256, "seconds": seconds}]}
    return profile(**(free | prefill | changes))


def limits(**changes: int) -> ReplicaLimits:
    values = {"max_loras": 8, "max_cpu_loras": 64, "total_rank": 128, "max_num_seqs": 16, "max_ongoing_requests": 16}
    return ReplicaLimits(**(values | changes))


def load(
    rate: float,
    *,
    adapters: int = 100,
    zipf: float = 1.0,
    prompts: str = "16-64",
    outputs: str = "exp:32",
    base_share: float = 0.0,
    popularity: Popularity | None = None,
) -> Workload:
    return Workload(
        rate,
        popularity or Popularity.zipf(adapters, zipf, rank=16),
        TokenLengths.parse("--prompt_tokens", prompts),
        TokenLengths.parse("--output_tokens", outputs),
        base_share,
    )


def e2e(simulated: Simulated) -> NDArray[np.float64]:
    return np.subtract(simulated.record.done, simulated.traffic.arrivals, dtype=np.float64)


def ttft(simulated: Simulated) -> NDArray[np.float64]:
    return np.subtract(simulated.record.first, simulated.traffic.arrivals, dtype=np.float64)
