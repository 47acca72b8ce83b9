"""How one server runs: what the command line sets, and the limits of contract section 10.

Owns the typed settings; knows nothing of models or of HTTP handling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ovms_lora.server.keys import ApiKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may ask for. Times are in seconds, sizes in bytes unless the name says otherwise.

    `receive_seconds` bounds the head and the body of a request, each; `send_seconds` is how long a client may leave
    what is sent to it unread. `buffered_outputs` is how many outputs of a sequence wait for a slow reader.
    """

    connections: int = 1024
    body_bytes: int = 2 * 1024 * 1024
    header_bytes: int = 16 * 1024
    receive_seconds: float = 20.0
    send_seconds: float = 60.0
    waiting_requests: int = 256
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    heartbeat_seconds: float = 60.0
    buffered_outputs: int = 4096
    prompts: int = 256
    n: int = 128
    stop_strings: int = 16
    stop_characters: int = 256
    logit_bias: int = 300
    schema_bytes: int = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The settings of one server.

    `api_keys` empty leaves the server open; `admin_keys`, where there are some, are what loading and unloading adapters
    and reloading the configuration needs. `poll_seconds` is how often config.json is looked at; 0 never does.
    `lora_path_prefixes` are the folders from which a client may load adapters, beside the loading path of the base.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    poll_seconds: float = 1.0
    log_level: str = "info"
    api_keys: tuple[ApiKey, ...] = field(default=(), repr=False)
    admin_keys: tuple[ApiKey, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    metrics: bool = True
    runtime_lora_updating: bool = False
    lora_path_prefixes: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)
