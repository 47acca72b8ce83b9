"""The examples and the README's block of the offline API, run as they stand, on SmolLM2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.client import ROOT

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]


def run(*words: str, cwd: Path) -> list[str]:
    """Run Python; return the lines that it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Processed prompts: 100%" in done.stderr
    return done.stdout.decode().splitlines()


def test_the_first_example_continues_its_prompts(int8_base: Path, tmp_path: Path) -> None:
    lines = run(str(ROOT / "examples" / "offline_inference.py"), str(int8_base), cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == ["Prompt", "Generated"] * 4
    assert lines[2] == "Prompt:    'The capital of France is'"
    assert "Paris" in lines[3]


def test_two_adapters_answer_their_prompts_in_one_call(int8_base: Path, tmp_path: Path) -> None:
    lines = run(str(ROOT / "examples" / "multi_lora_offline.py"), str(int8_base), cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == ["sql"] * 2 + ["tools"] * 4 + ["base"]
    assert all("SELECT" in line for line in lines[:2])
    assert all('"name": "set_timer"' in line for line in lines[2:4])
    assert all('"name": "play_song"' in line for line in lines[4:6])
    assert "SELECT" not in lines[6]


def test_the_block_of_the_readme_runs(int8_base: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "import LLM" in block)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base_model").symlink_to(int8_base)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = run("-c", block, cwd=tmp_path)
    assert lines[0].startswith("sql: SELECT")
    assert lines[1].startswith("base: ")
    assert "SELECT" not in lines[1]
