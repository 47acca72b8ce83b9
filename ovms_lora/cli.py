"""The command line: `ovms-lora serve …`, `ovms-lora export …`, `ovms-lora check …`.

Owns flags, exit codes and how errors look: `error:` and `hint:` on stderr; 0 is well, 1 failed, 2 misused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ovms_lora import __version__
from ovms_lora.core.errors import OvmsLoraError, UsageError
from ovms_lora.core.flags import FlagParser


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
        return _serve(arguments[1:])
    if arguments[:1] == ["ray"]:
        return _ray(arguments[1:])
    if arguments[:1] == ["check"]:
        return _check(_check_parser().parse_all(arguments[1:]))
    if arguments[:1] in (["list"], ["remove"]):
        from ovms_lora.export import repository_cli

        return repository_cli.run(arguments[0], arguments[1:])
    parser = FlagParser(prog="ovms-lora", description="Serve language models with LoRA adapters on OpenVINO.")
    parser.add_argument("--version", action="version", version=f"ovms-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("serve", help="answer requests over HTTP")
    commands.add_parser("ray", help="answer requests over HTTP with several replicas, on Ray Serve")
    commands.add_parser("export", help="make a model folder from a model and adapters")
    commands.add_parser("check", help="say whether a model, an adapter or a config.json can be served")
    commands.add_parser("list", help="say what a model repository holds")
    commands.add_parser("remove", help="take an exported model out of config.json and off the disk")
    parser.parse_all(arguments)
    return 0


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


def _serve(words: Sequence[str]) -> int:
    from ovms_lora.server.serve_flags import model_source, monitored, serve_parser, server_options

    arguments = serve_parser().parse_all(words)
    options, source = server_options(arguments), model_source(arguments)
    from ovms_lora.engine.model import load_model
    from ovms_lora.server.serve import serve

    serve(monitored(options, arguments), source, load_model)
    return 0


def _ray(words: Sequence[str]) -> int:
    from ovms_lora.scale.flags import ray_parser, scale_config

    arguments = ray_parser().parse_all(words)
    config = scale_config(arguments)
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed", hint='pip install "ovms-lora[ray]"')
    from ovms_lora.scale.run import run

    run(config, arguments.address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
