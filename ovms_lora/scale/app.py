"""build_app: the Serve application: an ingress before a deployment of engine replicas.

    HTTP ──► (Serve's proxy ──►) Ingress ──AdapterRouter──► EngineReplica, EngineReplica, …

Owns how the deployments are put together and what Serve is told of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from ray import serve
from ray.serve import Application, Deployment

from ovms_lora.scale.config import ENGINE, INGRESS, LEDGER, ScaleConfig
from ovms_lora.scale.flags import config_of
from ovms_lora.scale.ingress import Ingress
from ovms_lora.scale.ledger import Ledger
from ovms_lora.scale.replica import EngineReplica

_ROUTER = "ovms_lora.scale.router:AdapterRouter"
_STATS_SECONDS = 1.0
_HEALTH_SECONDS = 2.0
# A replica that does not even say whether it is healthy hangs; after three times Serve replaces it.
_HUNG_SECONDS = 10.0
# How often a replica that stops looks whether it has answered everything.
_DRAINED_SECONDS = 0.2
# Requests are logged by us, with their ids.
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
# Each replica has a question open at the ledger.
_FOLLOWERS = 100_000


def build_app(config: ScaleConfig | Mapping[str, Any]) -> Application:
    """Return the application. A mapping has the flags of `ovms-lora ray` as keys, as `args` of a Serve config file.

    Raises UsageError for flags that do not go, ConfigError for a configuration that cannot be used.
    """
    if not isinstance(config, ScaleConfig):
        config = config_of(config)
    # A copy: what reading leaves in a source must not make the same configuration look like another one.
    copy(config.source).read()
    options, limits = config.options, config.options.limits
    engines = _engines(config).bind(config.replica_options, config.source, config.threads)
    ledger = _small(Ledger, LEDGER, max_ongoing_requests=_FOLLOWERS)
    ingress = _small(
        serve.ingress()(Ingress),
        INGRESS,
        max_ongoing_requests=limits.connections,
        graceful_shutdown_timeout_s=limits.drain_seconds,
    )
    return ingress.bind(options, engines, ledger.bind(options, engines), config.own_port)


def _engines(config: ScaleConfig) -> Deployment:
    limits = config.options.limits
    return _deployment(
        EngineReplica,
        ENGINE,
        max_ongoing_requests=limits.connections,
        max_queued_requests=limits.waiting_requests,
        ray_actor_options={"num_cpus": config.num_cpus},
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_HUNG_SECONDS,
        graceful_shutdown_timeout_s=limits.drain_seconds,
        request_router_config={
            "request_router_class": _ROUTER,
            "request_router_kwargs": {"target_ongoing_requests": config.target_ongoing_requests},
            "request_routing_stats_period_s": _STATS_SECONDS,
        },
        **config.scaling,
    )


def _small(kind: type, name: str, **settings: Any) -> Deployment:
    """Return a deployment that computes little: no processor is reserved for it."""
    return _deployment(kind, name, ray_actor_options={"num_cpus": 0}, **settings)


def _deployment(kind: type, name: str, **settings: Any) -> Deployment:
    ending = {"graceful_shutdown_wait_loop_s": _DRAINED_SECONDS, "graceful_shutdown_timeout_s": _DRAINED_SECONDS}
    return serve.deployment(name=name, logging_config=_LOGGING, **{**ending, **settings})(kind)
