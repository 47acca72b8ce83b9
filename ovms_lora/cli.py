"""The command line: `ovms-lora serve …`, `ovms-lora export …`, `ovms-lora check …`.

Owns flags, exit codes and how errors look: `error:` and `hint:` on stderr; 0 is well, 1 failed, 2 misused, 130
interrupted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ovms_lora import __version__
from ovms_lora.core.errors import OvmsLoraError, UsageError
from ovms_lora.core.flags import FlagParser

_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code(_run, arguments)


def exit_code(run: Callable[[list[str]], int], words: list[str]) -> int:
    """Run a command; return its exit code, having printed what went wrong."""
    try:
        return run(words)
    except OvmsLoraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _INTERRUPTED


def _run(words: list[str]) -> int:
    command = _COMMANDS.get(words[0]) if words else None
    if command is not None:
        return command.run(words[1:])
    parser = FlagParser(prog="ovms-lora", description="Serve language models with LoRA adapters on OpenVINO.")
    parser.add_argument("--version", action="version", version=f"ovms-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, each in _COMMANDS.items():
        commands.add_parser(name, help=each.help)
    parser.parse_all(words)
    return 0


def _export(words: list[str]) -> int:
    # The exporter's libraries are not installed where models are only served.
    from ovms_lora.export.cli import main as export_main

    return int(export_main(words, prog="ovms-lora export"))


def _list(words: list[str]) -> int:
    from ovms_lora.export import repository_cli

    return repository_cli.run("list", words)


def _remove(words: list[str]) -> int:
    from ovms_lora.export import repository_cli

    return repository_cli.run("remove", words)


def _plan(words: list[str]) -> int:
    from ovms_lora.scale.plan import plan_cli

    return plan_cli.run(words)


def _bench(words: list[str]) -> int:
    """Run the package `bench` of the repository, which is not installed with this one."""
    repository = Path(__file__).resolve().parents[1]
    if not (repository / "bench" / "__main__.py").is_file():
        raise OvmsLoraError(
            "the benchmarks are not installed with ovms-lora", hint="run make bench in a checkout of the repository"
        )
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench", *words]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _check_parser() -> FlagParser:
    parser = FlagParser(prog="ovms-lora check", description="Say whether something can be served, and what is wrong.")
    parser.add_argument("path", metavar="PATH", help="a model folder, an adapter folder or address, or a config.json")
    parser.add("base", type=Path, metavar="DIR", help="model folder to check an adapter against")
    return parser


def _check(words: list[str]) -> int:
    from ovms_lora.adapters.bucket_url import BucketUrl
    from ovms_lora.check import check

    arguments = _check_parser().parse_all(words)
    place = BucketUrl.parse(arguments.path) if "://" in arguments.path else Path(arguments.path)
    for line in check(place, base=arguments.base):
        print(line)
    return 0


def _serve(words: list[str]) -> int:
    from ovms_lora.server.serve_flags import model_source, monitored, serve_parser, server_options

    arguments = serve_parser().parse_all(words)
    options, source = server_options(arguments), model_source(arguments)
    from ovms_lora.engine.model import load_model
    from ovms_lora.server.serve import serve

    serve(monitored(options, arguments), source, load_model)
    return 0


def _ray(words: list[str]) -> int:
    from ovms_lora.scale.flags import ray_parser, scale_config

    arguments = ray_parser().parse_all(words)
    config = scale_config(arguments)
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed", hint='pip install "ovms-lora[ray]"')
    from ovms_lora.scale.ray_environment import prefer_ray_environment

    prefer_ray_environment()
    from ovms_lora.scale.run import run

    run(config, arguments.address)
    return 0


@dataclass(frozen=True, slots=True)
class _Command:
    """A command: what runs it with its words, and what the list of commands says of it."""

    run: Callable[[list[str]], int]
    help: str


_COMMANDS = {
    "serve": _Command(_serve, "answer requests over HTTP"),
    "ray": _Command(_ray, "answer requests over HTTP with several replicas, on Ray Serve"),
    "export": _Command(_export, "make a model folder from a model and adapters"),
    "check": _Command(_check, "say whether a model, an adapter or a config.json can be served"),
    "list": _Command(_list, "say what a model repository holds"),
    "remove": _Command(_remove, "take an exported model out of config.json and off the disk"),
    "plan": _Command(_plan, "predict how many replicas a load needs"),
    "bench": _Command(_bench, "measure on this machine; in a checkout of the repository"),
}


if __name__ == "__main__":
    sys.exit(main())
