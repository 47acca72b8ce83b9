"""The command line: `ovms-lora serve …`, `ovms-lora export …`, `ovms-lora check …`.

Owns flags, exit codes and how errors look: `error:` and `hint:` on stderr; 0 is well, 1 failed, 2 misused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovms_lora import __version__
from ovms_lora.core.errors import ConfigError, OvmsLoraError, UsageError
from ovms_lora.core.flags import FlagParser

if TYPE_CHECKING:
    from ovms_lora.server.keys import ApiKey
    from ovms_lora.server.model_source import LoraDefaults, LoraModule, ModelSource
    from ovms_lora.server.options import ServerOptions

_LOG_LEVELS = {"error": "error", "warning": "warning", "info": "info", "debug": "debug", "trace": "debug"}
_ON_OFF = {"true": True, "false": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except OvmsLoraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(arguments: list[str]) -> int:
    # The exporter owns its flags, and its libraries are not installed where models are only served.
    if arguments[:1] == ["export"]:
        from ovms_lora.export.cli import main as export_main

        return int(export_main(arguments[1:], prog="ovms-lora export"))
    if arguments[:1] == ["serve"]:
        return _serve(_serve_parser().parse_all(arguments[1:]))
    if arguments[:1] == ["check"]:
        return _check(_check_parser().parse_all(arguments[1:]))
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    if arguments[:1] in (["list"], ["remove"]):
        from ovms_lora.export import repository_cli

        return repository_cli.run(arguments[0], arguments[1:])
    parser = FlagParser(prog="ovms-lora", description="Serve language models with LoRA adapters on OpenVINO.")
    parser.add_argument("--version", action="version", version=f"ovms-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("serve", help="answer requests over HTTP")
    commands.add_parser("export", help="make a model folder from a model and adapters")
    commands.add_parser("check", help="say whether a model, an adapter or a config.json can be served")
    commands.add_parser("list", help="say what a model repository holds")
    commands.add_parser("remove", help="take an exported model out of config.json and off the disk")
    commands.add_parser("bench", help="measure on this machine; in a checkout of the repository")
    parser.parse_all(arguments)
    return 0


def _bench(arguments: list[str]) -> int:
    """Run the package `bench` of the repository, which is not installed with this one."""
    repository = Path(__file__).resolve().parents[1]
    if not (repository / "bench" / "__main__.py").is_file():
        raise OvmsLoraError(
            "the benchmarks are not installed with ovms-lora", hint="run make bench in a checkout of the repository"
        )
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _serve_parser() -> FlagParser:
    parser = FlagParser(prog="ovms-lora serve", description="Answer requests over HTTP.")
    parser.add("config_path", type=Path, metavar="FILE", help="config.json with the models to serve")
    parser.add("model_path", type=Path, metavar="DIR", help="folder of the one model to serve")
    parser.add("model_name", metavar="NAME", help="name of the one model (default: the folder's name)")
    parser.add("plugin_config", metavar="JSON", help="OpenVINO properties for the one model")
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
        parser.add(name, type=_count, metavar="N", help=text)
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
    parser.add("dynamic_lora_loading_path", metavar="DIR", help="folder whose adapters are loaded when asked for")
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


def _check_parser() -> FlagParser:
    parser = FlagParser(prog="ovms-lora check", description="Say whether something can be served, and what is wrong.")
    parser.add_argument("path", type=Path, metavar="PATH", help="a model folder, an adapter folder or a config.json")
    parser.add("base", type=Path, metavar="DIR", help="model folder to check an adapter against")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from ovms_lora.check import check

    for line in check(arguments.path, base=arguments.base):
        print(line)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    options, source = _server_options(arguments), _model_source(arguments)
    if arguments.metrics_enable is None and arguments.config_path:
        options = replace(options, metrics=_metrics_wanted(arguments.config_path))
    from ovms_lora.engine.model import load_model
    from ovms_lora.server.serve import serve

    serve(options, source, load_model)
    return 0


def _server_options(arguments: argparse.Namespace) -> ServerOptions:
    from ovms_lora.server.limit_flags import limits_of
    from ovms_lora.server.options import ServerOptions

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


def _metrics_wanted(config_path: Path) -> bool:
    from ovms_lora.core.config import read_server_config

    return read_server_config(config_path).monitoring.metrics.enable is not False


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


def _model_source(arguments: argparse.Namespace) -> ModelSource:
    from ovms_lora.server.model_source import ConfigFile, SingleModel

    given = (arguments.config_path is not None, arguments.model_path is not None)
    if sum(given) != 1:
        raise UsageError(
            "give either --config_path or --model_path",
            hint="ovms-lora serve --config_path models/config.json --rest_port 8000",
        )
    if arguments.config_path:
        if arguments.model_name or arguments.plugin_config:
            raise UsageError("--model_name and --plugin_config go with --model_path only")
        return ConfigFile(arguments.config_path, _lora_defaults(arguments))
    name = arguments.model_name or arguments.model_path.absolute().name
    lora = _lora_defaults(arguments)
    if not lora.enable and (lora.modules or lora.loading_path or lora.options or arguments.allow_runtime_lora_updating):
        raise UsageError("flags of runtime adapters are given without --enable-lora", hint="add --enable-lora")
    plugin_config = _json_object("--plugin_config", arguments.plugin_config)
    return SingleModel(name, arguments.model_path, plugin_config, lora)


def _lora_defaults(arguments: argparse.Namespace) -> LoraDefaults:
    from ovms_lora.server.model_source import LoraDefaults, local_folder

    flags = {
        "max_loras": arguments.max_loras,
        "max_lora_rank": arguments.max_lora_rank,
        "max_cpu_loras": arguments.max_cpu_loras,
        "total_rank": arguments.lora_total_rank,
        "lora_dtype": arguments.lora_dtype,
    }
    path = arguments.dynamic_lora_loading_path
    try:
        loading_path = local_folder(path, Path()) if path else None
    except ConfigError as error:
        raise UsageError(f"--dynamic-lora-loading-path: {error.message}", hint=error.hint) from error
    return LoraDefaults(
        enable=arguments.enable_lora,
        options={name: value for name, value in flags.items() if value is not None},
        loading_path=loading_path,
        modules=tuple(module for text in arguments.lora_modules for module in _lora_modules(text)),
    )


def _lora_modules(text: str) -> list[LoraModule]:
    """Return the adapters of one `name=path`, JSON object or JSON array of objects. Raises UsageError."""
    from ovms_lora.server.model_source import LoraModule

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


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"{flag} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{flag} must be a JSON object", hint='like {"INFERENCE_PRECISION_HINT": "f32"}')
    return value


def _keys(flag: str, path: Path | None, variable: str, *, tenants: bool = False) -> tuple[ApiKey, ...]:
    from ovms_lora.server.keys import key_of_environment, read_keys

    if path is None:
        return key_of_environment(variable, os.environ.get(variable, ""))
    return read_keys(flag, path, tenants=tenants)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 2**20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _total_rank(text: str) -> int | str:
    return text if text == "auto" else _count(text)


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


if __name__ == "__main__":
    sys.exit(main())
