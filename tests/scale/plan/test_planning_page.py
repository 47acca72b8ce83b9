"""The worked example of docs/planning.md is what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ovms_lora import cli

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_the_example_prints_the_table_of_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = re.search(r"```sh\n(\.venv/bin/ovms-lora plan .*?)```\n+```text\n(.*?)```", PAGE, re.DOTALL)
    assert found
    assert cli.main(shlex.split(found[1].replace("\\\n", " "))[1:]) == 0
    assert capsys.readouterr().out == found[2]
