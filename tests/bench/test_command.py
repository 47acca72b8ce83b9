"""`ovms-lora bench` runs the suite of a checkout, and says so where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.arguments import MODEL_NAMES, parse
from bench.parts import PARTS
from ovms_lora import cli


def test_it_runs_the_suite_of_the_checkout(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    shown = capfd.readouterr().out
    assert all(part.name in shown for part in PARTS)


def test_an_installed_package_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "ovms_lora" / "cli.py"))
    assert cli.main(["bench"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: the benchmarks are not installed with ovms-lora"
    assert hint == "hint: run make bench in a checkout of the repository"


def test_parts_and_models_are_asked_for_by_name() -> None:
    given = parse(["batches", "memory", "--models", ",".join(MODEL_NAMES), "--long"])
    assert (given.names, given.models, given.long) == (("batches", "memory"), MODEL_NAMES, True)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (["batchs"], "did you mean batches?"),
        (["--models", "x"], "there are smollm2, llama-1b"),
        (["--lnog"], "--long"),
        (["--seconds", "0"], "--help"),
        (["--seconds", "9", "--long"], "takes the time that it needs"),
    ],
)
def test_what_is_unknown_is_refused_with_a_hint(wrong: list[str], hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *wrong]) == 2
    shown = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == ["error", "hint"]
    assert hint in shown[1]
