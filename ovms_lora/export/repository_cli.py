"""`ovms-lora list` and `ovms-lora remove`: their flags, and what they print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ovms_lora.core.flags import FlagParser
from ovms_lora.export.remove import remove
from ovms_lora.export.repository import describe


def list_parser() -> FlagParser:
    """Build the parser of `ovms-lora list`."""
    parser = FlagParser(prog="ovms-lora list", description="Say what a model repository holds.")
    _add_places(parser)
    parser.add("json", action="store_true", help="as JSON, with all that is known")
    return parser


def remove_parser() -> FlagParser:
    """Build the parser of `ovms-lora remove`."""
    parser = FlagParser(prog="ovms-lora remove", description="Take an exported model out of config.json and off disk.")
    parser.add_argument("name", metavar="NAME", help="name of the model; its runtime adapters stay")
    _add_places(parser)
    return parser


def run(command: str, words: Sequence[str]) -> int:
    """Run `list` or `remove` and return the exit code. Raises OvmsLoraError."""
    if command == "list":
        args = list_parser().parse_all(words)
        lines = describe(args.model_repository_path, args.config_file_path, as_json=args.json)
    else:
        args = remove_parser().parse_all(words)
        lines = remove(args.name, args.model_repository_path, args.config_file_path)
    for line in lines:
        print(line)
    return 0


def _add_places(parser: FlagParser) -> None:
    parser.add("model_repository_path", type=Path, default=Path("models"), metavar="DIR", help="default models")
    parser.add("config_file_path", type=Path, default=Path("config.json"), metavar="FILE", help="default config.json")
