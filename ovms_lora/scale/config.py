"""ScaleConfig: how a server runs on Ray Serve: what one replica serves, how many there are, and when one is full.

Owns the numbers and what Serve is told of them; the flags that set them stand in `flags`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ovms_lora.server.model_source import ModelSource
from ovms_lora.server.options import ServerOptions

# The names of the application and of its deployments.
APPLICATION = "ovms-lora"
INGRESS, ENGINE, LEDGER = "Ingress", "Engine", "Ledger"
TARGET = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig:
    """The settings of one Serve application.

    `min_replicas` equal to `max_replicas` is a fixed number. A replica with `target_ongoing_requests` has no room for
    more while others have, and so many per replica is what autoscaling aims at. `num_cpus` is what Ray reserves for a
    replica, and how many threads its engine computes with. `autoscaling` has more of Serve's AutoscalingConfig.
    With an `own_port` the ingress listens there itself, as fits one machine; without, Serve's proxies pass requests on.
    """

    options: ServerOptions
    source: ModelSource
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0
    target_ongoing_requests: int = TARGET
    autoscaling: Mapping[str, Any] = field(default_factory=dict)
    own_port: int | None = None

    @property
    def threads(self) -> int:
        """How many threads an engine computes with."""
        return max(1, int(self.num_cpus))

    @property
    def replica_options(self) -> ServerOptions:
        """The options of one replica: origins are the ingress's business."""
        return replace(self.options, allowed_origins=())

    @property
    def scaling(self) -> dict[str, Any]:
        """How many replicas Serve is to keep, as options of a deployment."""
        if self.min_replicas == self.max_replicas:
            return {"num_replicas": self.min_replicas}
        bounds = {"min_replicas": self.min_replicas, "max_replicas": self.max_replicas}
        target = {"target_ongoing_requests": self.target_ongoing_requests}
        return {"autoscaling_config": {**bounds, **target, **self.autoscaling}}
