"""The command line: `ovms-lora serve …`, `ovms-lora export …`.

Owns flags, exit codes and how errors look: `error:` and `hint:` on stderr; 0 is well, 1 failed, 2 misused.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ovms_lora import __version__
from ovms_lora.core.errors import OvmsLoraError, UsageError

if TYPE_CHECKING:
    from ovms_lora.server.model_source import ModelSource
    from ovms_lora.server.options import ServerOptions

_LOG_LEVELS = {"error": "error", "warning": "warning", "info": "info", "debug": "debug", "trace": "debug"}
_ON_OFF = {"true": True, "false": False}


class _Parser(argparse.ArgumentParser):
    """argparse with both spellings of a flag, and errors that say what was meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def add(self, name: str, **settings: Any) -> None:
        """Add a flag; `--a_b` is accepted as `--a-b` too."""
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **settings)

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse. Raises UsageError for what is not known."""
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            kind = "flag" if flag.startswith("-") else "argument"
            raise UsageError(f"unknown {kind} {flag}", hint=self._hint(flag))
        return values

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, with what the wrong choice may have meant."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        known = re.findall(r"[\w-]+", choice[2]) if choice else []
        raise UsageError(message, hint=_did_you_mean(choice[1], known) if choice else None)

    def _hint(self, flag: str) -> str:
        flags = [option for action in self._actions for option in action.option_strings]
        return _did_you_mean(flag, flags) or f"{self.prog} --help lists the flags"


def _did_you_mean(given: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {near[0]}?" if near else None


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

        return int(export_main(arguments[1:]))
    if arguments[:1] == ["serve"]:
        return _serve(_serve_parser().parse_all(arguments[1:]))
    parser = _Parser(prog="ovms-lora", description="Serve language models with LoRA adapters on OpenVINO.")
    parser.add_argument("--version", action="version", version=f"ovms-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("serve", help="answer requests over HTTP")
    commands.add_parser("export", help="make a model folder from a model and adapters")
    parser.parse_all(arguments)
    return 0


def _serve_parser() -> _Parser:
    parser = _Parser(prog="ovms-lora serve", description="Answer requests over HTTP.")
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
    parser.add("api_key_file", type=Path, metavar="FILE", help="API keys, one a line (or the environment's API_KEY)")
    parser.add("allowed_origins", default="", metavar="ORIGINS", help="origins for CORS, comma-separated, or *")
    parser.add(
        "metrics_enable", type=_on_off, nargs="?", const=True, default=True, metavar="true|false", help="default true"
    )
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    options, source = _server_options(arguments), _model_source(arguments)
    from ovms_lora.engine.model import load_model
    from ovms_lora.server.serve import serve

    serve(options, source, load_model)
    return 0


def _server_options(arguments: argparse.Namespace) -> ServerOptions:
    from ovms_lora.server.options import ServerOptions

    return ServerOptions(
        host=arguments.rest_bind_address,
        port=arguments.rest_port,
        poll_seconds=arguments.file_system_poll_wait_seconds,
        log_level=arguments.log_level,
        api_keys=_api_keys(arguments.api_key_file),
        allowed_origins=tuple(filter(None, (origin.strip() for origin in arguments.allowed_origins.split(",")))),
        metrics=arguments.metrics_enable,
    )


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
        return ConfigFile(arguments.config_path)
    name = arguments.model_name or arguments.model_path.absolute().name
    return SingleModel(name, arguments.model_path, _json_object("--plugin_config", arguments.plugin_config))


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"{flag} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{flag} must be a JSON object", hint='like {"INFERENCE_PRECISION_HINT": "f32"}')
    return value


def _api_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        key = os.environ.get("API_KEY", "").strip()
        return (key,) if key else ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --api_key_file {path}", hint="give a text file with one key a line") from error
    keys = tuple(filter(None, map(str.strip, lines)))
    if not keys:
        raise UsageError(f"--api_key_file {path} holds no key", hint="write one key a line")
    return keys


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
