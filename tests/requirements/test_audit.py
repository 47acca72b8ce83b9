"""What `make audit` makes of pip-audit's answers."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

AUDIT = Path(__file__).parents[2] / "requirements" / "audit.py"
judge: Callable[[dict[str, dict[str, Any]]], tuple[list[str], int]] = runpy.run_path(str(AUDIT))["judge"]


def test_what_has_no_weakness_is_clean() -> None:
    assert judge({"a 1": {"vulns": []}}) == (["1 packages looked up, 0 weaknesses known"], 0)


def test_a_weakness_fails_and_is_named() -> None:
    lines, code = judge({"a 1": {"vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}, "b 1": {"vulns": []}})
    assert (lines[0], code) == ("a 1: CVE-1, repaired in 2", 1)


def test_what_was_not_looked_up_is_no_success() -> None:
    lines, code = judge({"a 1": {"vulns": []}, "b": {"skip_reason": "not found on PyPI"}})
    assert code == 1
    assert lines[:2] == ["1 packages looked up, 0 weaknesses known", "error: 1 not looked up: b"]
