"""The LoRA demo runs, on the tiny Llama: exports for both devices, a list, a server, two different answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ovms_lora.core.graph_pbtxt import parse_graph
from tests.tiny_llama import build_tiny_adapter, build_tiny_llama

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_merges_serves_and_compares(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path / "base")
    build_tiny_adapter(tmp_path / "adapter", tmp_path / "base")
    flags = ["--source_model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    flags += ["--repository", str(tmp_path / "models"), "--prompt", "Once upon a time"]
    command = [sys.executable, str(ROOT / "examples" / "lora_demo.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, base, merged = re.split(r"^(?:base|merged)_model: ", done.stdout, flags=re.MULTILINE)
    assert len(re.findall(r"^\$ ", steps, re.MULTILINE)) == 5
    assert base.strip() != merged.strip()
    graph = parse_graph((tmp_path / "models" / "gpu" / "merged_model" / "graph.pbtxt").read_text())
    assert (graph.options.device, graph.options.plugin_config) == ("GPU", {"KV_CACHE_PRECISION": "u8"})
