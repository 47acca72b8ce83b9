"""The flags of `ovms-lora ray`: those of `ovms-lora serve`, and how many replicas there are and where.

Owns the words; also as the `args` of a Serve config file, which have the flags as keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser
from ovms_lora.scale.config import TARGET, ScaleConfig
from ovms_lora.server.serve_flags import (
    count,
    json_object,
    model_source,
    monitored,
    positive,
    serve_parser,
    server_options,
)

# What Serve's own file says elsewhere.
_NOT_IN_A_FILE = {
    "rest_port": "http_options.port",
    "rest_bind_address": "http_options.host",
    "address": "the address of `serve deploy`",
}


def ray_parser() -> FlagParser:
    """Return the parser."""
    parser = serve_parser("ovms-lora ray", "Answer requests over HTTP with several replicas, on Ray Serve.")
    numbers = (
        ("num_replicas", "so many replicas, always (default 1)"),
        ("min_replicas", "so many at least (default 1); more when there is more to do"),
        ("max_replicas", "so many at most"),
        (
            "target_ongoing_requests",
            f"requests that fill a replica: then others are preferred, and autoscaling adds one (default {TARGET})",
        ),
    )
    for name, text in numbers:
        parser.add(name, type=count, metavar="N", help=text)
    parser.add(
        "num_cpus", type=_cpus, default=1.0, metavar="N", help="processors, and so threads, of a replica (default 1)"
    )
    parser.add(
        "max_num_adapters_per_replica", dest="max_loras", type=count, metavar="N", help="another name of --max_loras"
    )
    parser.add(
        "autoscaling_config", metavar="JSON", help='more of Serve\'s AutoscalingConfig, like {"downscale_delay_s": 60}'
    )
    parser.add("address", metavar="ADDRESS", help="Ray cluster to run on, or auto (default: one of its own, here)")
    return parser


def scale_config(arguments: argparse.Namespace) -> ScaleConfig:
    """Return what the flags say. Raises UsageError or ConfigError."""
    options, source = server_options(arguments), model_source(arguments)
    least, most = _bounds(arguments)
    autoscaling = json_object("--autoscaling_config", arguments.autoscaling_config)
    for key in ("min_replicas", "max_replicas", "target_ongoing_requests"):
        if key in autoscaling:
            raise UsageError(f"{key} does not stand in --autoscaling_config", hint=f"give --{key}")
    if autoscaling and least == most:
        raise UsageError("--autoscaling_config goes with --max_replicas only", hint="add --max_replicas")
    return ScaleConfig(
        options=monitored(options, arguments),
        source=source,
        min_replicas=least,
        max_replicas=most,
        num_cpus=arguments.num_cpus,
        target_ongoing_requests=arguments.target_ongoing_requests or TARGET,
        autoscaling=autoscaling,
    )


def config_of(given: Mapping[str, Any]) -> ScaleConfig:
    """Return what the `args` of a Serve config file say. Raises UsageError or ConfigError."""
    return scale_config(ray_parser().parse_all(list(_words(given))))


def _words(given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        if place := _NOT_IN_A_FILE.get(key.replace("-", "_")):
            raise UsageError(f"{key} does not stand in args", hint=f"set {place}")
        for item in value if isinstance(value, list) else [value]:
            if item is True or item is False:
                yield from ([f"--{key}"] if item else [])
            else:
                yield from (f"--{key}", json.dumps(item) if isinstance(item, dict) else str(item))


def _bounds(arguments: argparse.Namespace) -> tuple[int, int]:
    fixed, least, most = arguments.num_replicas, arguments.min_replicas, arguments.max_replicas
    if fixed is not None:
        if least is not None or most is not None:
            raise UsageError(
                "--num_replicas is given beside --min_replicas or --max_replicas",
                hint="give one number, or two bounds",
            )
        return fixed, fixed
    if least is not None and most is None:
        raise UsageError("--min_replicas needs --max_replicas", hint="add --max_replicas")
    least, most = least or 1, most or 1
    if least > most:
        raise UsageError(f"--min_replicas {least} is more than --max_replicas {most}", hint="exchange them")
    return least, most


def _cpus(text: str) -> float:
    return positive(text, 1024, "processors")
