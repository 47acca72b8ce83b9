"""Strengths: the factors on adapters that requests, config.json and the command line may give.

Owns the bound. It is far above what any adapter is trained for (1.0) and far below what overflows the 32 bits that
adapters are computed in, even where three adapted layers multiply: so a strength can spoil an answer, but never make
the logits infinite or undefined.
"""

from __future__ import annotations

MAX_STRENGTH = 1000.0


def is_strength(value: float) -> bool:
    """Tell whether a number may be a strength: |value| ≤ MAX_STRENGTH, which no infinity and no NaN is."""
    return abs(value) <= MAX_STRENGTH
