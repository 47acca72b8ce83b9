"""Popularity: which adapter a request asks for, and the rank of each.

Either Zipf's law (the i-th adapter's share goes with 1 / i^exponent), or a file of what was counted:

    {"sql": 3.2, "tools": {"rate": 0.5, "rank": 32}}        requests per second by adapter
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_lora.core.errors import PlanError, UsageError
from ovms_lora.core.strict_model import unique_keys

_FORM = 'write {"sql": 3.2, "tools": {"rate": 0.5, "rank": 32}}: requests per second by adapter'


@dataclass(frozen=True, slots=True, eq=False)
class Popularity:
    """Shares [adapters] with sum 1, and ranks [adapters]. `rate` is requests per second, where that is known."""

    shares: NDArray[np.float64]
    ranks: NDArray[np.int64]
    rate: float | None = None

    @classmethod
    def zipf(cls, adapters: int, exponent: float, *, rank: int) -> Popularity:
        """Return adapters of one rank by Zipf's law; exponent 0 makes all equally popular."""
        weights = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
        return cls(weights / weights.sum(), np.full(adapters, rank))

    @classmethod
    def counted(cls, path: Path, *, rank: int) -> Popularity:
        """Read a file of rates; `rank` is that of adapters that name none. Raises UsageError and PlanError."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the file of rates {path} cannot be read: {error.strerror}", hint=_FORM) from error
        try:
            found = json.loads(text, object_pairs_hook=unique_keys)
        except ValueError as error:
            raise PlanError(f"{path} is not valid JSON: {error}", hint=_FORM) from error
        if not isinstance(found, dict) or not found:
            raise PlanError(f"{path} is not an object of rates by adapter", hint=_FORM)
        entries = [_entry(path, name, value, rank) for name, value in found.items()]
        rates = np.array([rate for rate, _ in entries])
        total = float(rates.sum())
        if total <= 0:
            raise PlanError(f"{path}: all rates are 0", hint=_FORM)
        return cls(rates / total, np.array([rank for _, rank in entries]), total)


def _entry(path: Path, name: str, value: Any, default_rank: int) -> tuple[float, int]:
    known = value if isinstance(value, dict) else {"rate": value}
    rate, rank = known.get("rate"), known.get("rank", default_rank)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate) or rate < 0:
        raise PlanError(f"{path}: the rate of {name!r} is not a number of 0 or more", hint=_FORM)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or not set(known) <= {"rate", "rank"}:
        raise PlanError(f"{path}: {name!r} has more than a rate and a rank of 1 or more", hint=_FORM)
    return float(rate), rank
