"""run: `ovms-lora ray`: brings the application up on Ray, says where it answers, and takes it down at a signal.

    start or join Ray ──► deploy ──► ready ──► first signal: refuse, drain, stop;  second signal: exit now

Owns the process and its signals. A Ray that was started here ends with it; on one that was joined the application does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import AuthenticationError
from ray.serve import Application
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from ovms_lora.core.errors import ConfigError, EngineError
from ovms_lora.scale.app import build_app
from ovms_lora.scale.config import APPLICATION, ScaleConfig
from ovms_lora.scale.ray_environment import prefer_cluster_environment
from ovms_lora.scale.ray_errors import RAY_ERRORS
from ovms_lora.server import logs
from ovms_lora.server.serve import bind, url_of

log = logging.getLogger(__name__)

# Objects are requests and pieces of answers, and no tensors.
_OBJECT_STORE_BYTES = 100 * 2**20

_ENDING = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 10.0  # for the last words of the ingress
_TOKEN_HINT = "give its token: RAY_AUTH_MODE=token, and ~/.ray/auth_token or RAY_AUTH_TOKEN"
_LOOK_SECONDS = 0.5
# In which Serve's proxy passes on what the ingress has said last.
_LINGER_SECONDS = 2.0


def run(config: ScaleConfig, address: str | None) -> None:
    """Serve until a signal comes.

    Raises ConfigError when the configuration is not usable, the port is taken, the cluster cannot be joined or has an
    application of this name, and EngineError when no replica comes up.
    """
    logs.configure(config.options.log_level)
    # Found taken before Ray is started, which takes seconds. On a cluster Serve may have the port, and be right.
    own = None if address else _free_place(config)
    application = build_app(replace(config, own_port=own.port) if own else config)
    with _signals(joined=bool(address)) as signals, _ray(address):
        signals.listen()  # again: Ray has put its own handlers there
        if APPLICATION in serve.status().applications:
            raise ConfigError(f"{APPLICATION} runs on this cluster", hint="end it with serve shutdown")
        url = _start_serve(own, config)
        try:
            _deploy(application)
            print(f"ready: {url} serving with {_number(config)}", file=sys.stderr, flush=True)
            signals.wait()
            _drain(config.options.limits.drain_seconds)
            if address:
                time.sleep(_LINGER_SECONDS)
        finally:
            if address:
                _delete()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where HTTP is to be answered."""

    url: str
    host: str
    port: int


def _free_place(config: ScaleConfig) -> _Place:
    """Return the place that the options name. Raises ConfigError when it is taken."""
    with bind(config.options.host, config.options.port) as listener:
        return _Place(url_of(listener), config.options.host, listener.getsockname()[1])


def _start_serve(own: _Place | None, config: ScaleConfig) -> str:
    """Start Serve unless the cluster runs one; return where requests are answered: by the ingress, or by Serve's proxy.

    Raises ConfigError when the proxy's port is taken.
    """
    if own:
        serve.start(proxy_location=ProxyLocation.Disabled)
        return own.url
    if running := _get_global_client(raise_if_no_controller_running=False):
        http = running.http_config
        return f"http://{http.host}:{http.port}"
    place = _free_place(config)
    serve.start(http_options={"host": place.host, "port": place.port})
    return place.url


def _deploy(application: Application) -> None:
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:  # what Serve says when it gives up on an application
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise EngineError(f"the replicas do not start: {reason}", hint="the lines above say why") from error


def _delete() -> None:
    try:
        serve.delete(APPLICATION)
    except TimeoutError:
        log.warning("the application does not end in time, and is left to Serve")


def _number(config: ScaleConfig) -> str:
    least, most = config.min_replicas, config.max_replicas
    if least == most:
        return f"{least} replica{'s' if least > 1 else ''}"
    return f"{least} to {most} replicas"


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    prefer_cluster_environment()
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=address or "local", log_to_driver=True, **({} if address else own))
    except ConnectionError as error:
        raise ConfigError(f"there is no Ray cluster at {address}", hint="ray start --head starts one") from error
    except AuthenticationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the Ray cluster at {address} does not let us in: {reason}", hint=_TOKEN_HINT) from error
    try:
        yield
    finally:
        ray.shutdown()  # one that was started here goes with all that runs on it


class _Signals:
    """The first signal ends the wait, and the second one the process, as the first one does before the wait.

    Ray's own handlers would leave no time to take anything down. A Ray that was started here ends with this process;
    raising something while it starts would crash in it. On a cluster that was joined the application stays.
    """

    def __init__(self, *, joined: bool) -> None:
        self._joined = joined
        self._waiting = False
        self._came = threading.Event()

    def listen(self) -> None:
        """Take the signals that end a process from now on."""
        for number in _ENDING:
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Wait for the first signal."""
        self._waiting = True
        # Now and then it looks itself: the system may give a signal to another thread, which does not wake this one.
        while not self._came.wait(_LOOK_SECONDS):
            pass

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._came.is_set() or not self._waiting:
            if self._joined:
                os.write(2, b"what was deployed stays on the cluster: serve shutdown ends it\n")
            os._exit(128 + number)
        self._came.set()


@contextmanager
def _signals(*, joined: bool) -> Iterator[_Signals]:
    signals = _Signals(joined=joined)
    before = {number: signal.getsignal(number) for number in _ENDING}
    signals.listen()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drain(seconds: float) -> None:
    """Have the ingress refuse what is new, so that clients hear it in their dialect, until the rest has ended.

    Raises nothing: where the ingress does not answer, there is nobody to wait for.
    """
    try:
        asyncio.run(_told_to_drain(seconds + _GRACE_SECONDS))
    except (TimeoutError, *RAY_ERRORS) as error:
        log.warning("the ingress does not answer: %s", error)
    else:
        time.sleep(_LINGER_SECONDS)


async def _told_to_drain(seconds: float) -> None:
    # On an event loop: a handle needs one where RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 stands in the environment.
    await serve.get_app_handle(APPLICATION).broadcast("drain").results_async(timeout_s=seconds)
