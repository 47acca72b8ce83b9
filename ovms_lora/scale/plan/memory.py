"""MemoryUse: what one replica needs, and how many adapters fit into the memory there is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ovms_lora.core.errors import PlanError
from ovms_lora.scale.plan.replica import ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one replica: model, KV cache for a full batch of long requests, adapters in graph and host memory."""

    base: int
    kv_cache: int
    resident: int
    host: int

    @property
    def total(self) -> int:
        """All together."""
        return self.base + self.kv_cache + self.resident + self.host

    @classmethod
    def of(cls, profile: ReplicaProfile, limits: ReplicaLimits, workload: Workload) -> MemoryUse:
        """Return what a replica with these limits needs. Adapters count with the mean rank in host memory."""
        tokens = limits.max_num_seqs * (workload.prompts.long + workload.outputs.long)
        adapters = min(limits.max_cpu_loras, len(workload.popularity.ranks))
        return cls(
            profile.base_bytes,
            tokens * profile.kv_bytes_per_token,
            limits.total_rank * profile.resident_bytes_per_rank * 3 // 2,  # half of them may be copied (LoraTiles)
            round(adapters * _host_bytes(profile, workload)),
        )


def fitted(profile: ReplicaProfile, limits: ReplicaLimits, workload: Workload, memory: float | None) -> ReplicaLimits:
    """Return limits whose host adapters fit into `memory` bytes; `max_cpu_loras` 0 stands for as many as fit.

    Raises PlanError when they do not fit.
    """
    adapters = len(workload.popularity.ranks)
    if memory is None:
        return limits if limits.max_cpu_loras else replace(limits, max_cpu_loras=min(64, adapters))
    without = MemoryUse.of(profile, replace(limits, max_cpu_loras=0), workload)
    room = max(-1, int((memory - without.total) // max(1.0, _host_bytes(profile, workload))))
    if room < 1:
        raise PlanError(
            f"one replica needs {without.total / 1e9:.2f} GB without adapters in host memory, of {memory / 1e9:.2f} GB",
            hint="give more memory, or lower --max_num_seqs, --max_loras or the lengths",
        )
    if limits.max_cpu_loras > room and adapters > room:
        raise PlanError(
            f"{limits.max_cpu_loras} adapters in host memory do not fit into {memory / 1e9:.2f} GB",
            hint=f"--max_cpu_loras {room} fits; without the flag as many are taken as fit",
        )
    return limits if limits.max_cpu_loras else replace(limits, max_cpu_loras=min(room, adapters))


def _host_bytes(profile: ReplicaProfile, workload: Workload) -> float:
    return float(workload.popularity.ranks.mean()) / profile.rank * profile.host_bytes_per_adapter
