"""serve: one process that answers on one port until a signal ends it.

    bind ──► begin with the first model ──► answer probes, load models ──► ready ──► a signal: drain ──► stop

Owns the socket and the order of a start. Blocks until the end.
"""

from __future__ import annotations

import errno
import socket
import sys

from ovms_lora.core.errors import ConfigError
from ovms_lora.server import logs
from ovms_lora.server.early_load import EarlyLoad, LoadModel
from ovms_lora.server.model_source import ModelSource, ReadAlready
from ovms_lora.server.options import ServerOptions

# Engine and event loop share the interpreter's lock, and who computes gives it up no sooner than this. The default of
# five milliseconds, each time that a step takes the lock again, would let a flood of requests slow the engine down.
_SWITCH_SECONDS = 0.0005


def serve(options: ServerOptions, source: ModelSource, load: LoadModel) -> None:
    """Serve until a signal comes.

    Raises ConfigError when the configuration is not usable or the port is taken, and what kept the last model from
    being loaded when none could be.
    """
    specs = source.read()
    logs.configure(options.log_level)
    share_interpreter()
    with bind(options.host, options.port) as listener, EarlyLoad(load) as early:
        for spec in specs[:1]:
            early.begin(spec, max_waiting=options.limits.waiting_requests)
        # Only now: what speaks HTTP takes a second to be imported, in which the device compiles.
        from ovms_lora.server.http_server import run

        # What was read stays what is wanted, until it changes: a model that is replaced meanwhile is noticed as later.
        run(options, ReadAlready(source, specs), early, listener, url_of(listener))


def share_interpreter() -> None:
    """Have the threads of this process take turns often enough for an engine."""
    sys.setswitchinterval(_SWITCH_SECONDS)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use", hint="stop what listens there, or give another --rest_port"
            ) from error
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}", hint="check --rest_bind_address and --rest_port"
        ) from error


def url_of(listener: socket.socket) -> str:
    """Return the address under which a socket is asked."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
