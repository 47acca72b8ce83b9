"""The example of many adapters on Ray as a user runs it: it deploys, asks, and takes everything down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.lora_models import Bases
from tests.scale.fleet import SQL, write_repository

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_multi_lora.py"


def test_the_example_deploys_and_asks_the_base_and_each_adapter(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = Bases(tmp_path_factory.mktemp("bases")).get("llama")
    repository = write_repository(base, tmp_path_factory.mktemp("repository")).parent
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    folders = ("--model_path", str(base.folder), "--adapters", str(repository / "loras"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), *folders, "--port", str(port)],
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answers = dict(line.split(": ", 1) for line in run.stdout.splitlines() if line.startswith("smollm2"))
    assert {"smollm2", f"smollm2:{SQL}", "smollm2:mail"} <= set(answers), run.stdout
    assert len(set(answers.values())) == len(answers), run.stdout
