"""Flags are taken in both spellings, and a mistake is answered with what was meant."""

import pytest

from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser(prog="tool")
    parser.add("max_items", type=int, default=1)
    parser.add("dry-run", action="store_true")
    parser.add("level", choices=("low", "high"), default="low")
    parser.add("needed", required=True)
    return parser


@pytest.mark.parametrize("words", [["--max_items", "2"], ["--max-items", "2"], ["--max_items=2"], ["--max-items=2"]])
def test_both_spellings_set_the_flag(parser: FlagParser, words: list[str]) -> None:
    assert parser.parse_all(["--needed", "x_y", "--dry_run", *words]).max_items == 2


def test_values_keep_their_spelling(parser: FlagParser) -> None:
    assert parser.parse_all(["--needed", "a_b-c"]).needed == "a_b-c"
    assert parser.parse_all(["--needed=--max_items-x"]).needed == "--max_items-x"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--max_item", "2"], "unknown flag --max_item", "did you mean --max_items?"),
        (["--max-item=2"], "unknown flag --max-item", "did you mean --max-items?"),
        (["--zzz"], "unknown flag --zzz", "tool --help lists the flags"),
        (["--needed", "x", "stray"], "unknown argument stray", "tool --help"),
        (["--needed", "x", "--level", "hihg"], "invalid choice: 'hihg'", "did you mean high?"),
        (["--needed", "x", "--max_items", "x"], "invalid int value", "tool --help"),
        ([], "required: --needed", "tool --help"),
    ],
)
def test_mistakes_are_usage_errors_with_a_hint(parser: FlagParser, words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parser.parse_all(words)
    assert hint in (error.value.hint or "")
