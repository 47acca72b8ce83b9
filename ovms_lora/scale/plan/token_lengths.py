"""TokenLengths: how long prompts and answers are.

128        all have 128 tokens
64-256     any number from 64 to 256, equally often
exp:128    exponential with mean 128: many short, few long
FILE       one number a line, drawn at random: lengths that were counted
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovms_lora.core.errors import UsageError

_FORMS = "write 128, 64-256, exp:128, or a file of one number a line"
_LONGEST = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class TokenLengths:
    """A distribution of token counts of 1 or more: uniform, exponential, or `counted` ones."""

    text: str
    low: int = 1
    high: int = 1
    exponential_mean: int | None = None
    counted: NDArray[np.int64] | None = None

    @classmethod
    def parse(cls, flag: str, text: str) -> TokenLengths:
        """Return what a flag's value means. Raises UsageError."""
        if match := re.fullmatch(r"exp:(\d{1,8})", text, re.ASCII):
            return cls(text, exponential_mean=_length(flag, match[1]))
        if match := re.fullmatch(r"(\d{1,8})(?:-(\d{1,8}))?", text, re.ASCII):
            low, high = _length(flag, match[1]), _length(flag, match[2] or match[1])
            if low > high:
                raise UsageError(f"{flag} {text!r} ends before it begins", hint=_FORMS)
            return cls(text, low=low, high=high)
        return cls(text, counted=_read(flag, Path(text)))

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return so many lengths."""
        if self.counted is not None:
            return rng.choice(self.counted, count)
        if self.exponential_mean is not None:
            return np.maximum(1, np.rint(rng.exponential(self.exponential_mean, count))).astype(np.int64)
        return rng.integers(self.low, self.high + 1, count)

    @property
    def mean(self) -> float:
        """The mean number of tokens."""
        if self.counted is not None:
            return float(self.counted.mean())
        return float(self.exponential_mean or (self.low + self.high) / 2)

    @property
    def long(self) -> int:
        """A length that 99 of 100 do not exceed."""
        if self.counted is not None:
            return int(np.ceil(np.quantile(self.counted, 0.99)))
        return int(np.ceil(4.61 * self.exponential_mean)) if self.exponential_mean else self.high


def _length(flag: str, text: str) -> int:
    if not 1 <= int(text) <= _LONGEST:
        raise UsageError(f"{flag}: {text} is not a number of tokens from 1 to {_LONGEST}", hint=_FORMS)
    return int(text)


def _read(flag: str, path: Path) -> NDArray[np.int64]:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{flag} {str(path)!r} is neither a length nor a file that can be read", hint=_FORMS
        ) from error
    if not words or not all(re.fullmatch(r"\d{1,8}", word, re.ASCII) for word in words):
        raise UsageError(f"{flag}: {path} does not hold one number of tokens a line", hint=_FORMS)
    return np.array([_length(flag, word) for word in words])
