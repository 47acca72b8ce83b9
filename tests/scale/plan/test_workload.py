"""Loads are what their flags say, and the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.core.errors import OvmsLoraError, PlanError, UsageError
from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.token_lengths import TokenLengths
from tests.scale.plan.profiles import load


def test_zipf_shares_go_with_the_place() -> None:
    shares = Popularity.zipf(100, 1.0, rank=16).shares
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10)
    assert np.ptp(Popularity.zipf(100, 0.0, rank=16).shares) == 0


def test_counted_rates_make_shares_ranks_and_the_sum(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"sql": 3, "tools": {"rate": 1.0, "rank": 32}}))
    found = Popularity.counted(path, rank=16)
    assert found.shares.tolist() == [0.75, 0.25]
    assert found.ranks.tolist() == [16, 32]
    assert found.rate == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"a": -1}', '{"a": true}', '{"a": {"rank": 8}}', '{"a": {"rate": 1, "x": 2}}']
)
def test_rates_that_cannot_be_are_refused_with_the_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"rates\.json") as caught:
        Popularity.counted(path, rank=16)
    assert "requests per second by adapter" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("128", 128, 128, 128.0), ("64-256", 64, 256, 160.0), ("exp:100", 1, 10**4, 100.0)],
)
def test_lengths_are_drawn_as_written(text: str, low: int, high: int, mean: float) -> None:
    lengths = TokenLengths.parse("--prompt_tokens", text)
    drawn = lengths.draw(20_000, np.random.default_rng(0))
    assert drawn.min() >= low
    assert drawn.max() <= high
    assert drawn.mean() == pytest.approx(mean, rel=0.03) == lengths.mean
    assert np.mean(drawn <= lengths.long) >= 0.985


def test_lengths_are_drawn_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    path.write_text("10\n10\n400\n")
    lengths = TokenLengths.parse("--prompt_tokens", str(path))
    assert set(lengths.draw(100, np.random.default_rng(0)).tolist()) == {10, 400}
    assert lengths.mean == pytest.approx(140)


@pytest.mark.parametrize("text", ["", "0", "9-3", "exp:0", "2000000", "no-such-file"])
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--prompt_tokens") as caught:
        TokenLengths.parse("--prompt_tokens", text)
    assert "64-256" in (caught.value.hint or "")


def test_a_file_of_words_is_no_file_of_lengths(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("ten\n")
    with pytest.raises(OvmsLoraError, match="one number of tokens a line"):
        TokenLengths.parse("--output_tokens", str(tmp_path / "words"))


def test_traffic_has_the_rate_the_shares_and_its_seed() -> None:
    workload = load(5.0, adapters=10, base_share=0.25)
    traffic = workload.draw(20_000, 7)
    assert traffic.arrivals == sorted(traffic.arrivals)
    assert 20_000 / traffic.arrivals[-1] == pytest.approx(5.0, rel=0.03)
    counts = np.bincount(np.array(traffic.adapters) + 1, minlength=11) / 20_000
    assert counts[0] == pytest.approx(0.25, abs=0.01)
    assert counts[1:] == pytest.approx(workload.popularity.shares * 0.75, abs=0.01)
    assert workload.draw(20_000, 7) == traffic
    assert workload.draw(100, 7).arrivals == traffic.arrivals[:100]
    assert workload.draw(20_000, 8) != traffic
