"""StepCost: what one more row in a step costs, learned from the steps that were run.

    seconds of a step ≈ base + per_row · rows

On a device that waits for memory a further row is nearly free; on one that is busy computing it costs its full share.
"""

from __future__ import annotations

_FIRST_SHARE = 0.15  # of a step with one row: what a further row is taken to cost before it is known
_WEIGHT = 0.2
_OUTLIER = 3.0  # times what was expected; a process that was held up says nothing about rows


class StepCost:
    """Follows the two numbers above, which change with the length of the texts and with what else the machine does."""

    def __init__(self) -> None:
        self._base = 0.0
        self._per_row = 0.0
        self._last: tuple[int, float] | None = None

    def observe(self, rows: int, seconds: float) -> None:
        """Take in a step that only continued texts: `rows` tokens were computed."""
        if self._last is None:
            self._per_row = _FIRST_SHARE * seconds / rows
            self._base = seconds - self._per_row * rows
        seconds = min(seconds, _OUTLIER * self.seconds(rows))
        if self._last is not None and self._last[0] != rows:
            # Two steps that follow each other differ in their rows and in little else.
            last_rows, last_seconds = self._last
            slope = (seconds - last_seconds) / (rows - last_rows)
            most = max(seconds / rows, last_seconds / last_rows)
            self._per_row += _WEIGHT * (min(max(slope, 0.0), most) - self._per_row)
        self._base += _WEIGHT * (max(seconds - self._per_row * rows, 0.0) - self._base)
        self._last = rows, seconds

    def seconds(self, rows: int) -> float:
        """Return how long a step of so many rows takes."""
        return self._base + self._per_row * rows

    def price(self, sequences: int, seconds_per_token: float = 0.0) -> float:
        """Return how likely a guessed token must be to pay for itself.

        `sequences` bring one token each in `seconds(sequences)`. A guess costs a row, and `seconds_per_token` before;
        in that time so many tokens, a fraction of one, would have come without it.
        """
        whole = self.seconds(sequences)
        if whole <= 0.0:
            return _FIRST_SHARE
        return sequences * (self._per_row + seconds_per_token) / whole
