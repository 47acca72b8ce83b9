"""Imports point one way, and serving needs none of the export's libraries."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ovms_lora"

# What each part may import of the others.
ALLOWED = {
    "core": set[str](),
    "adapters": {"core"},
    "engine": {"adapters", "core"},
    "offline": {"engine", "adapters", "core"},
    "server": {"engine", "adapters", "core"},
    "scale": {"server", "engine", "adapters", "core"},
    "export": {"adapters", "core"},
}
EXPORT_ONLY = {"torch", "transformers", "peft", "optimum", "nncf", "gguf", "huggingface_hub"}


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_one_way(part: str) -> None:
    for path in modules(part):
        for name in imported(path):
            if name.startswith("ovms_lora."):
                other = name.split(".")[1]
                assert other in ALLOWED[part] | {part, "__version__"}, f"{path} imports {name}"


@pytest.mark.parametrize("part", ["core", "adapters", "engine", "offline", "server", "scale"])
def test_serving_imports_nothing_of_the_export(part: str) -> None:
    for path in modules(part):
        for name in imported(path):
            assert name.split(".")[0] not in EXPORT_ONLY, f"{path} imports {name}"


@pytest.mark.parametrize("part", ["core", "offline", "server", "scale"])
def test_only_the_engine_knows_openvino(part: str) -> None:
    for path in modules(part):
        for name in imported(path):
            assert name.split(".")[0] != "openvino", f"{path} imports {name}"


@pytest.mark.parametrize("part", ["core", "adapters", "engine", "offline"])
def test_only_the_server_knows_http(part: str) -> None:
    for path in modules(part):
        for name in imported(path):
            assert name.split(".")[0] not in {"fastapi", "starlette", "uvicorn", "httpx"}, f"{path} imports {name}"


def test_a_fresh_server_has_loaded_nothing_of_the_export() -> None:
    program = (
        "import sys, ovms_lora.cli, ovms_lora.engine.model, ovms_lora.server.http_server\n"
        f"print(*sorted(set(sys.modules) & {EXPORT_ONLY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_command_line_is_quick_to_load() -> None:
    program = "import sys, ovms_lora.cli\nprint(*sorted(set(sys.modules) & {'openvino', 'fastapi', 'uvicorn'}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "imports", ["ovms_lora.engine.model", "ovms_lora, openvino", "ovms_lora.export.cli, nncf, optimum.intel"]
)
def test_nothing_is_reported_to_the_makers_of_openvino(imports: str) -> None:
    program = (
        f"import {imports}\nimport multiprocessing, sys\n"
        "print(*sorted(name for name in sys.modules if name.startswith('openvino_telemetry.')))\n"
        "print(len(multiprocessing.active_children()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in {"CI", "TF_BUILD", "JENKINS_URL"}}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split("\n") == ["", "0", ""]
