"""StepCosts: how long a replica's steps take, between and beyond the points that were measured.

    decode    for each measured number of adapters a curve over rows; between curves, and on them, linear
    prefill   linear between measured numbers of tokens
    mixed     decode + prefill - one row: the weights are read once for both

Beyond the most rows or adapters nothing is guessed: `StepCosts` refuses. Prompts beyond the longest measured chunk go
on at the slope of the last two points.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovms_lora.core.errors import PlanError
from ovms_lora.scale.plan.replica_profile import ReplicaProfile


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Tables in seconds: `decode[rows][adapters]` and `prefill[tokens]`; index 0 of each is 0."""

    decode: list[list[float]]
    prefill: list[float]

    @classmethod
    def of(cls, profile: ReplicaProfile, *, rows: int, adapters: int, tokens: int) -> StepCosts:
        """Return the tables for steps of up to so many rows, adapters and prefill tokens.

        Raises PlanError for more rows, or more adapters at once, than were measured.
        """
        adapters = min(adapters, rows)
        for name, wanted, measured in (
            ("rows", rows, profile.max_rows),
            ("adapters in a step", adapters, profile.max_adapters),
        ):
            if wanted > measured:
                raise PlanError(
                    f"the profile was measured with up to {measured} {name}, not {wanted}",
                    hint=f"measure with --max_rows {rows} --max_adapters {adapters}, or plan with less",
                )
        grid = _decode(profile, rows, adapters)
        return cls([[0.0] * (adapters + 1), *grid.tolist()], _prefill(profile, tokens).tolist())

    def mixed(self, rows: int, adapters: int, tokens: int) -> float:
        """Return the seconds of a step that computes prompt tokens, beside rows that decode."""
        if not rows:
            return self.prefill[tokens]
        alone = self.decode[1][min(adapters, 1)]
        return self.decode[rows][min(adapters, rows)] + max(0.0, self.prefill[tokens] - alone)


def _decode(profile: ReplicaProfile, rows: int, adapters: int) -> NDArray[np.float64]:
    """Return seconds [rows, adapters + 1], for 1 to `rows` rows."""
    counts = sorted({point.adapters for point in profile.steps})
    wanted = np.arange(1, rows + 1)
    curves = np.stack([_curve(profile, count, wanted) for count in counts], axis=1)
    return np.stack([np.interp(np.arange(adapters + 1), counts, row) for row in curves])


def _curve(profile: ReplicaProfile, adapters: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    points = sorted((point.rows, point.seconds) for point in profile.steps if point.adapters == adapters)
    return _linear(rows, points)


def _prefill(profile: ReplicaProfile, tokens: int) -> NDArray[np.float64]:
    points = sorted((point.tokens, point.seconds) for point in profile.prefill)
    seconds = _linear(np.arange(tokens + 1), points)
    seconds[0] = 0.0
    return seconds


def _linear(at: NDArray[np.int64], points: list[tuple[int, float]]) -> NDArray[np.float64]:
    """Interpolate; below the first point stay there, beyond the last one go on at the last slope, never downwards."""
    places, values = zip(*points, strict=True)
    found: NDArray[np.float64] = np.interp(at, places, values)
    if len(points) > 1:
        (x0, y0), (x1, y1) = list(itertools.pairwise(points))[-1]
        found += np.maximum(at - x1, 0) * max(0.0, (y1 - y0) / (x1 - x0))
    return found
