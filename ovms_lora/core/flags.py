"""Command lines as all programs here read them: both spellings of every flag, and mistakes answered with a hint.

Owns: `--a_b` and `--a-b` meaning the same, and UsageError where argparse would print and exit.
Does not know: any flag.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from ovms_lora.core.errors import UsageError


class FlagParser(argparse.ArgumentParser):
    """An argument parser; flags are declared in one spelling, shown so in `--help`, and taken in both."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add(self, name: str, **settings: Any) -> None:
        """Declare the flag `--name`."""
        self.add_argument(f"--{name}", **settings)

    def parse_all(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse. Raises UsageError for what is not known, with the flag or choice that it resembles."""
        flags = {_spelling(flag): flag for parser in self._with_commands() for flag in parser._option_string_actions}
        values, unknown = self.parse_known_args([self._known(word, flags) for word in words])
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]}", hint=f"{self.prog} --help lists the flags")
        return values

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, with what a wrong choice may have meant."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        close = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else None
        raise UsageError(message, hint=close or f"{self.prog} --help says more")

    def _with_commands(self) -> Iterator[argparse.ArgumentParser]:
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()

    def _known(self, word: str, flags: Mapping[str, str]) -> str:
        """Return a word with its flag as declared. An unknown one is said before argparse misses a required one."""
        if not word.startswith("--") or " " in word or word == "--":
            return word
        flag, equals, value = word.partition("=")
        if _spelling(flag) in flags:
            return flags[_spelling(flag)] + equals + value
        close = did_you_mean(flag, [*flags.values(), *flags])
        raise UsageError(f"unknown flag {flag}", hint=close or f"{self.prog} --help lists the flags")


def _spelling(flag: str) -> str:
    return flag.replace("_", "-")


def did_you_mean(given: str, known: Sequence[str]) -> str | None:
    """Return a hint that names what of `known` a wrong word resembles, None where nothing does."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]}?" if near else None
