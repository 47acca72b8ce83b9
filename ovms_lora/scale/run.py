"""run: `ovms-lora ray`: brings the application up on Ray, says where it answers, and takes it down at a signal.

    start or join Ray ──► deploy ──► ready ──► first signal: refuse, drain, stop;  second signal: exit now

Owns the process and its signals. A Ray that was started here ends with it; on one that was joined the application does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from ovms_lora.core.errors import ConfigError
from ovms_lora.scale.app import build_app
from ovms_lora.scale.config import APPLICATION, ScaleConfig
from ovms_lora.server import logs
from ovms_lora.server.serve import bind, url_of

log = logging.getLogger(__name__)

# Objects are requests and pieces of answers, and no tensors.
_OBJECT_STORE_BYTES = 100 * 2**20


def run(config: ScaleConfig, address: str | None) -> None:
    """Serve until a signal comes.

    Raises ConfigError when the configuration is not usable, the port is taken or the cluster cannot be reached.
    """
    logs.configure(config.options.log_level)
    application = build_app(config)
    with bind(config.options.host, config.options.port) as listener:
        url, port = url_of(listener), listener.getsockname()[1]
    with _ray(address), _signals() as stop:
        serve.start(http_options={"host": config.options.host, "port": port})
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
            print(f"ready: {url} serving with {_number(config)}", file=sys.stderr, flush=True)
            stop.wait()
            _drain()
        finally:
            serve.delete(APPLICATION)


def _number(config: ScaleConfig) -> str:
    least, most = config.min_replicas, config.max_replicas
    if least == most:
        return f"{least} replica{'s' if least > 1 else ''}"
    return f"{least} to {most} replicas"


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    # Nothing goes out of the house unless somebody wants it to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=address or "local", log_to_driver=True, **({} if address else own))
    except ConnectionError as error:
        raise ConfigError(f"there is no Ray cluster at {address}", hint="ray start --head starts one") from error
    try:
        yield
    finally:
        if address is None:
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Give an event that the first signal sets; the second one ends the process."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drain() -> None:
    """Have the ingress refuse what is new, so that clients hear it in their dialect while the rest ends."""
    try:
        serve.get_app_handle(APPLICATION).broadcast("drain").results(timeout_s=5)
    except (TimeoutError, RayServeException) as error:
        log.warning("the ingress does not answer: %s", error)
