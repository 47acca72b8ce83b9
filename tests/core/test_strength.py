from __future__ import annotations

import math

import pytest

from ovms_lora.core.strength import MAX_STRENGTH, is_strength


@pytest.mark.parametrize("value", [0, 1, -0.5, MAX_STRENGTH, -MAX_STRENGTH])
def test_numbers_within_the_bound_are_strengths(value: float) -> None:
    assert is_strength(value)


@pytest.mark.parametrize("value", [MAX_STRENGTH * 1.001, -1e300, 10**400, math.inf, -math.inf, math.nan])
def test_others_are_none(value: float) -> None:
    assert not is_strength(value)
