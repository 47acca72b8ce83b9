"""The flags of `ovms-lora serve`, and what they mean: how a server runs, and which models it serves.

Owns the flags' texts and checks; what a bound of `--limit` is stands in `limit_flags`.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovms_lora.adapters.sources import loading_path
from ovms_lora.core.config import read_server_config
from ovms_lora.core.errors import ConfigError, UsageError
from ovms_lora.core.flags import FlagParser
from ovms_lora.core.speculation import SpeculationOptions, parse_speculative_config
from ovms_lora.server.keys import ApiKey, key_of_environment, read_keys
from ovms_lora.server.limit_flags import limits_of
from ovms_lora.server.model_source import ConfigFile, LoraDefaults, LoraModule, ModelSource, SingleModel
from ovms_lora.server.options import ServerOptions

_LOG_LEVELS = {"error": "error", "warning": "warning", "info": "info", "debug": "debug", "trace": "debug"}
_ON_OFF = {"true": True, "false": False}


def serve_parser(prog: str = "ovms-lora serve", description: str = "Answer requests over HTTP.") -> FlagParser:
    """Return the parser of `ovms-lora serve`, to which another command may add."""
    parser = FlagParser(prog=prog, description=description)
    parser.add("config_path", type=Path, metavar="FILE", help="config.json with the models to serve")
    parser.add("model_path", type=Path, metavar="DIR", help="folder of the one model to serve")
    parser.add("model_name", metavar="NAME", help="name of the one model (default: the folder's name)")
    parser.add("plugin_config", metavar="JSON", help="OpenVINO properties for the one model")
    parser.add(
        "speculative_config",
        metavar="JSON",
        help='guess ahead with the one model: {"method": "ngram", "num_speculative_tokens": N, "prompt_lookup_max": N} '
        'or {"model": DIR, "num_speculative_tokens": N}',
    )
    parser.add("rest_port", type=_port, default=8000, metavar="PORT", help="default 8000; 0 takes any free port")
    parser.add("rest_bind_address", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1")
    parser.add(
        "file_system_poll_wait_seconds",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="how often config.json is looked at for changes (default 1; 0 never)",
    )
    parser.add("log_level", type=_log_level, default="info", metavar="LEVEL", help="error, warning, info or debug")
    parser.add(
        "api_key_file",
        type=Path,
        metavar="FILE",
        help="API keys, one a line, or JSON of tenants (or the environment's API_KEY)",
    )
    parser.add(
        "limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="change a bound on what clients may do (repeatable; docs/limits.md has them all)",
    )
    parser.add("allowed_origins", default="", metavar="ORIGINS", help="origins for CORS, comma-separated, or *")
    parser.add(
        "metrics_enable",
        type=_on_off,
        nargs="?",
        const=True,
        metavar="true|false",
        help="default: what monitoring in config.json says, else true",
    )
    _add_lora_flags(parser)
    return parser


def _add_lora_flags(parser: FlagParser) -> None:
    """Add vLLM's flags; they hold for `--model_path`, or where an entry of `--config_path` says nothing else."""
    parser.add("enable_lora", action="store_true", help="let every model take runtime adapters")
    numbers = (
        ("max_loras", "adapters in the graph at once (default 8)"),
        ("max_lora_rank", "largest rank of an adapter, up to 256 (default 64)"),
        ("max_cpu_loras", "adapters kept in host memory (default 64)"),
    )
    for name, text in numbers:
        parser.add(name, type=count, metavar="N", help=text)
    parser.add("lora_total_rank", type=_total_rank, metavar="N|auto", help="ranks of all residents (default auto)")
    parser.add("lora_dtype", choices=("auto", "f32", "bf16"), help="precision of adapters (default auto)")
    parser.add(
        "lora_modules",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help='adapters to load at start, or as JSON {"name", "path", "base_model_name"}',
    )
    parser.add(
        "dynamic_lora_loading_path",
        metavar="DIR|URL",
        help="folder, or s3://, gs:// or abfss:// address, whose adapters are loaded when asked for",
    )
    parser.add(
        "adapter_cache_path",
        type=Path,
        metavar="DIR",
        help="where adapters from a bucket are kept (default ~/.cache/ovms-lora/adapters)",
    )
    parser.add("adapter_cache_size", type=_gigabytes, metavar="GB", help="how much of them is kept (default 10)")
    parser.add("allow_runtime_lora_updating", action="store_true", help="let clients load and unload adapters")
    parser.add(
        "lora_path_prefix",
        type=Path,
        action="append",
        metavar="DIR",
        help="where clients may load adapters from (repeatable; default the folder of config.json; "
        "a loading path always is)",
    )
    parser.add(
        "admin_key_file",
        type=Path,
        metavar="FILE",
        help="keys for that and for reloading (or the environment's ADMIN_API_KEY)",
    )


def server_options(arguments: argparse.Namespace) -> ServerOptions:
    """Return how the server runs. Raises UsageError."""
    return ServerOptions(
        host=arguments.rest_bind_address,
        port=arguments.rest_port,
        poll_seconds=arguments.file_system_poll_wait_seconds,
        log_level=arguments.log_level,
        api_keys=_keys("--api_key_file", arguments.api_key_file, "API_KEY", tenants=True),
        admin_keys=_keys("--admin_key_file", arguments.admin_key_file, "ADMIN_API_KEY"),
        allowed_origins=tuple(filter(None, (origin.strip() for origin in arguments.allowed_origins.split(",")))),
        metrics=arguments.metrics_enable is not False,
        runtime_lora_updating=arguments.allow_runtime_lora_updating,
        lora_path_prefixes=_lora_path_prefixes(arguments),
        limits=limits_of(arguments.limit),
    )


def monitored(options: ServerOptions, arguments: argparse.Namespace) -> ServerOptions:
    """Return the options with metrics as config.json wants them, unless a flag says it. Raises ConfigError."""
    if arguments.metrics_enable is not None or arguments.config_path is None:
        return options
    return replace(options, metrics=read_server_config(arguments.config_path).monitoring.metrics.enable is not False)


def _lora_path_prefixes(arguments: argparse.Namespace) -> tuple[Path, ...]:
    given: list[Path] | None = arguments.lora_path_prefix
    if given is None:
        # The operator's own files lie there; with --model_path only a loading path is left.
        return (arguments.config_path.absolute().parent,) if arguments.config_path else ()
    if not arguments.allow_runtime_lora_updating:
        raise UsageError("--lora-path-prefix needs --allow-runtime-lora-updating")
    for folder in given:
        if not folder.is_dir():
            raise UsageError(f"--lora-path-prefix {folder} is not a folder")
    return tuple(folder.absolute() for folder in given)


def model_source(arguments: argparse.Namespace) -> ModelSource:
    """Return where the wanted models stand; nothing is read yet. Raises UsageError."""
    given = (arguments.config_path is not None, arguments.model_path is not None)
    if sum(given) != 1:
        raise UsageError(
            "give either --config_path or --model_path",
            hint="ovms-lora serve --config_path models/config.json --rest_port 8000",
        )
    if arguments.config_path:
        if arguments.model_name or arguments.plugin_config or arguments.speculative_config:
            raise UsageError("--model_name, --plugin_config and --speculative_config go with --model_path only")
        return ConfigFile(arguments.config_path, _lora_defaults(arguments))
    name = arguments.model_name or arguments.model_path.absolute().name
    lora = _lora_defaults(arguments)
    if not lora.enable and (lora.modules or lora.loading_path or lora.options or arguments.allow_runtime_lora_updating):
        raise UsageError("flags of runtime adapters are given without --enable-lora", hint="add --enable-lora")
    plugin_config = json_object("--plugin_config", arguments.plugin_config)
    return SingleModel(name, arguments.model_path, plugin_config, lora, _speculation(arguments.speculative_config))


def _speculation(text: str | None) -> SpeculationOptions | None:
    if text is None:
        return None
    try:
        return parse_speculative_config(json_object("--speculative_config", text))
    except ConfigError as error:
        raise UsageError(f"--speculative_config: {error.message}", hint=error.hint) from error


def _lora_defaults(arguments: argparse.Namespace) -> LoraDefaults:
    flags = {
        "max_loras": arguments.max_loras,
        "max_lora_rank": arguments.max_lora_rank,
        "max_cpu_loras": arguments.max_cpu_loras,
        "total_rank": arguments.lora_total_rank,
        "lora_dtype": arguments.lora_dtype,
        "adapter_cache_path": arguments.adapter_cache_path and str(arguments.adapter_cache_path.absolute()),
        "adapter_cache_size": arguments.adapter_cache_size,
    }
    path = arguments.dynamic_lora_loading_path
    try:
        found_in = loading_path(path, Path()) if path else None
    except ConfigError as error:
        raise UsageError(f"--dynamic-lora-loading-path: {error.message}", hint=error.hint) from error
    return LoraDefaults(
        enable=arguments.enable_lora,
        options={name: value for name, value in flags.items() if value is not None},
        loading_path=found_in,
        modules=tuple(module for text in arguments.lora_modules for module in _lora_modules(text)),
    )


def _lora_modules(text: str) -> list[LoraModule]:
    """Return the adapters of one `name=path`, JSON object or JSON array of objects. Raises UsageError."""
    hint = 'write sql=loras/sql, or {"name": "sql", "path": "loras/sql"}'
    if not text.lstrip().startswith(("{", "[")):
        alias, _, folder = text.partition("=")
        if not alias or not folder:
            raise UsageError(f"--lora-modules {text!r} is not name=path", hint=hint)
        return [LoraModule(alias, Path(folder))]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--lora-modules is not valid JSON: {error}", hint=hint) from error
    modules = []
    for item in value if isinstance(value, list) else [value]:
        known = item if isinstance(item, dict) and set(item) <= {"name", "path", "base_model_name"} else {}
        name, path, base = known.get("name"), known.get("path"), known.get("base_model_name")
        if not (isinstance(name, str) and isinstance(path, str) and isinstance(base, str | None)):
            raise UsageError("--lora-modules takes objects of name, path and base_model_name", hint=hint)
        modules.append(LoraModule(name, Path(path), base))
    return modules


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """Return the JSON object that a flag gives, empty when it is not given. Raises UsageError."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"{flag} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{flag} must be a JSON object", hint='like {"INFERENCE_PRECISION_HINT": "f32"}')
    return value


def _keys(flag: str, path: Path | None, variable: str, *, tenants: bool = False) -> tuple[ApiKey, ...]:
    if path is None:
        return key_of_environment(variable, os.environ.get(variable, ""))
    return read_keys(flag, path, tenants=tenants)


def count(text: str) -> int:
    """Read the number of something."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 2**20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def positive(text: str, most: float, what: str) -> float:
    """Read a number above 0 and up to `most`; `what` it counts is for the error."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}")
    return number


def _gigabytes(text: str) -> float:
    return positive(text, 1e6, "GB")


def _total_rank(text: str) -> int | str:
    return text if text == "auto" else count(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _log_level(text: str) -> str:
    level = _LOG_LEVELS.get(text.lower())
    if level is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_LOG_LEVELS)}")
    return level


def _on_off(text: str) -> bool:
    value = _ON_OFF.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value
