"""What a row costs is learned from steps, whatever else changes their time."""

from __future__ import annotations

import numpy as np
import pytest

from ovms_lora.engine.step_cost import StepCost


def learned(base: float, per_row: float, *, noise: float = 0.0, rows: tuple[int, ...] = (1, 6)) -> StepCost:
    cost, rng = StepCost(), np.random.default_rng(0)
    for number in range(400):
        count = rows[number % len(rows)]
        cost.observe(count, (base + per_row * count) * (1 + noise * rng.standard_normal()))
    return cost


@pytest.mark.parametrize(("base", "per_row"), [(0.01, 0.0001), (0.005, 0.002), (0.0, 0.003), (0.1, 0.0)])
def test_both_numbers_are_found(base: float, per_row: float) -> None:
    cost = learned(base, per_row)
    for rows in (1, 4, 16):
        assert cost.seconds(rows) == pytest.approx(base + per_row * rows, rel=0.02, abs=1e-5)


def test_noise_is_averaged() -> None:
    cost = learned(0.008, 0.001, noise=0.05)
    assert cost.price(1) == pytest.approx(0.001 / 0.009, abs=0.06)


@pytest.mark.parametrize(("sequences", "expected"), [(1, 0.1), (9, 0.5), (90, 0.909)])
def test_the_more_sequences_run_the_dearer_is_a_guess(sequences: int, expected: float) -> None:
    assert learned(0.009, 0.001).price(sequences) == pytest.approx(expected, abs=0.03)


def test_the_time_of_a_draft_model_counts() -> None:
    cost = learned(0.009, 0.001)
    assert cost.price(1, 0.004) == pytest.approx(0.5, abs=0.02)


def test_a_step_that_was_held_up_changes_little() -> None:
    cost = learned(0.009, 0.001)
    cost.observe(1, 60.0)
    assert cost.seconds(1) < 0.02


def test_a_machine_that_becomes_slower_is_followed() -> None:
    cost = learned(0.009, 0.001)
    for number in range(200):
        rows = 1 + 5 * (number % 2)
        cost.observe(rows, 10 * (0.009 + 0.001 * rows))
    assert cost.seconds(1) == pytest.approx(0.1, rel=0.05)


def test_before_anything_is_known_a_guess_has_some_price() -> None:
    assert 0 < StepCost().price(1) < 0.5
