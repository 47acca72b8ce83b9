"""A profile is read strictly, and what lies between its points is interpolated; beyond them nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.errors import PlanError
from ovms_lora.scale.plan.replica_profile import read_profile
from ovms_lora.scale.plan.step_costs import StepCosts
from tests.scale.plan.profiles import REALISTIC, profile


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": []}, "steps"),
        ({"bring_in_seconds": -1}, "bring_in_seconds"),
        ({"bring_in_seconds": None}, "bring_in_seconds"),
        ({"speed": 3}, "speed"),
        ({"steps": [{"rows": 1, "adapters": 2, "seconds": 0.1}]}, "at most as many adapters as rows"),
        ({"steps": [{"rows": 1, "adapters": 1, "seconds": 0.1}]}, "no point without adapters"),
        ({"steps": [{"rows": 1, "adapters": 0, "seconds": 0.1}] * 2}, "same rows and adapters"),
        ({"prefill": [{"tokens": 8, "seconds": 0.1}] * 2}, "same number of tokens"),
        ({"prefill": [{"tokens": 8, "seconds": 0.1}]}, "prefill"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_with_the_place(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(REALISTIC | changes))
    with pytest.raises(PlanError, match=said) as caught:
        read_profile(path)
    assert "bench.replica_profile" in (caught.value.hint or "")


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(PlanError, match=name):
            read_profile(tmp_path / name)


def test_measured_points_are_met_and_between_them_is_the_mean() -> None:
    costs = StepCosts.of(profile(), rows=16, adapters=8, tokens=512)
    for point in profile().steps:
        assert costs.decode[point.rows][point.adapters] == pytest.approx(point.seconds)
    assert costs.decode[12][0] == pytest.approx((costs.decode[8][0] + costs.decode[16][0]) / 2)
    assert costs.decode[8][3] == pytest.approx((costs.decode[8][2] + costs.decode[8][4]) / 2)
    assert costs.prefill[136] == pytest.approx((0.03 + 0.2) / 2)
    assert costs.prefill[496] == pytest.approx(0.2 + 0.17)  # at the last slope
    assert costs.prefill[0] == 0.0


def test_a_step_with_prompt_and_rows_reads_the_weights_once() -> None:
    costs = StepCosts.of(profile(), rows=16, adapters=8, tokens=256)
    assert costs.mixed(0, 0, 256) == pytest.approx(0.2)
    assert costs.mixed(4, 2, 256) == pytest.approx(costs.decode[4][2] + 0.2 - costs.decode[1][1])


def test_more_rows_or_adapters_than_were_measured_are_refused() -> None:
    with pytest.raises(PlanError, match="up to 16 rows, not 17") as caught:
        StepCosts.of(profile(), rows=17, adapters=8, tokens=1)
    assert caught.value.hint == "measure with --max_rows 17 --max_adapters 8, or plan with less"
    with pytest.raises(PlanError, match="up to 8 adapters in a step, not 9"):
        StepCosts.of(profile(), rows=16, adapters=9, tokens=1)
