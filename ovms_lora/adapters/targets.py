"""Which modules an adapter is for, and with what rank and scaling: PEFT's matching rules, as of PEFT 0.21.

PEFT matches the entries of a `target_modules` list as names, a `target_modules` string as a regular expression, and the
keys of `rank_pattern` and `alpha_pattern` as regular expressions for the end of a path, where the first that fits wins.
Keys are nearly always plain names; those are compared here without any expression (a `.` stands for any character, as
it does to PEFT). Knows nothing of tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ovms_lora.adapters.pattern import Pattern, StepBudget
from ovms_lora.adapters.peft_config import ALL_LINEAR, PeftConfig
from ovms_lora.adapters.quoting import quoted
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

_Number = TypeVar("_Number", int, float)

_PLAIN = re.compile(r"[A-Za-z0-9_\-.]+")
_SUFFIX = re.compile(r"\^?(?:[A-Za-z0-9_\-.]|\\\.)+\$?")
_ANY = "\0"
# PEFT's rule without a layers_pattern: the first number that follows at least two other parts.
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class ModuleScale:
    """The rank and the scaling that the configuration gives to one module."""

    rank: int
    scaling: float


class _Suffix:
    """A plain key: the end of a path, from a dot or the beginning on; a dot in it stands for any character.

    `^` before it, `$` behind it and `\\.` inside are still plain.
    """

    def __init__(self, key: str) -> None:
        self._whole = key.startswith("^")
        body = key.removeprefix("^").removesuffix("$")
        self._chars = ".".join(part.replace(".", _ANY) for part in body.split("\\."))
        self._last = self._chars.rpartition(_ANY)[2]

    def matches(self, path: str) -> bool:
        start = len(path) - len(self._chars)
        if start < 0 or not path.endswith(self._last):
            return False
        if start > 0 and (self._whole or path[start - 1] != "."):
            return False
        same = zip(self._chars, path[start:], strict=True)
        return len(self._last) == len(self._chars) or all(mine in (_ANY, char) for mine, char in same)


class _Expression:
    """A key that is a real regular expression, as PEFT wraps it."""

    def __init__(self, key: str, field: str, budget: StepBudget) -> None:
        self._pattern = Pattern(rf"(.*\.)?({key})$", field=field, budget=budget)

    def matches(self, path: str) -> bool:
        return self._pattern.fullmatch(path)


class Targets:
    """Answers for one configuration. Raises AdapterError where a pattern of it is malformed or too expensive.

    `output_head` is the path of the layer that "all-linear" leaves out.
    """

    def __init__(self, config: PeftConfig, *, output_head: str | None) -> None:
        self._config = config
        self._output_head = output_head
        self._budget = StepBudget()
        self._targets = _NameSet(config.target_modules, "target_modules", self._budget)
        self._excluded = _NameSet(config.exclude_modules, "exclude_modules", self._budget)
        self._ranks = self._keys("rank_pattern", config.rank_pattern)
        self._alphas = self._keys("alpha_pattern", config.alpha_pattern)
        self._layers = [_layer_expression(pattern) for pattern in config.layers_pattern] or [_LAYER]

    def _keys(self, field: str, keys: Iterable[str]) -> tuple[tuple[str, _Suffix | _Expression], ...]:
        return tuple(
            (key, _Suffix(key) if _SUFFIX.fullmatch(key) else _Expression(key, field, self._budget)) for key in keys
        )

    def include(self, path: str) -> bool:
        """Whether PEFT would put a LoRA on the linear layer at `path`."""
        config = self._config
        if config.exclude_modules and self._excluded.matches(path):
            return False
        if config.target_modules == ALL_LINEAR:
            return path != self._output_head
        if not self._targets.matches(path):
            return False
        # A path that is listed in full is meant, whatever its layer.
        return config.layers_to_transform is None or path in config.target_modules or self._in_layers(path)

    def _in_layers(self, path: str) -> bool:
        assert self._config.layers_to_transform is not None
        found = next((match for pattern in self._layers if (match := pattern.match(path))), None)
        return found is not None and int(found["index"]) in self._config.layers_to_transform

    def scale(self, path: str) -> ModuleScale:
        """Return rank and scaling of the module at `path`: alpha/r, or alpha/√r with rsLoRA."""
        config = self._config
        rank = _first(self._ranks, config.rank_pattern, path, config.r)
        alpha = _first(self._alphas, config.alpha_pattern, path, config.lora_alpha)
        return ModuleScale(rank=rank, scaling=alpha / (math.sqrt(rank) if config.use_rslora else rank))


class _NameSet:
    """PEFT's two forms of target_modules and exclude_modules: names to end with, or one expression for all."""

    def __init__(self, names: tuple[str, ...] | str, field: str, budget: StepBudget) -> None:
        self._names = frozenset(names) if isinstance(names, tuple) else frozenset()
        self._pattern = Pattern(names, field=field, budget=budget) if isinstance(names, str) else None

    def matches(self, path: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fullmatch(path)
        while path not in self._names:
            _, dot, path = path.partition(".")
            if not dot:
                return False
        return True


def _layer_expression(pattern: str) -> re.Pattern[str]:
    """PEFT's expression for a layers_pattern. Plain names only: those cannot make `re` backtrack for long."""
    if not _PLAIN.fullmatch(pattern):
        raise AdapterError(
            AdapterErrorCode.UNSUPPORTED,
            f"layers_pattern {quoted(pattern)} is not supported",
            hint="name the list of layers, for example 'layers'",
        )
    return re.compile(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.")


def _first(
    keys: Iterable[tuple[str, _Suffix | _Expression]], values: Mapping[str, _Number], path: str, default: _Number
) -> _Number:
    return next((values[key] for key, form in keys if form.matches(path)), default)
