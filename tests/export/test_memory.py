"""How much memory an export takes, on the shape of a model of a billion weights. Minutes long: only with `--slow`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.conftest import Workshop
from tests.tiny_llama import build_tiny_adapter, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
BOUND = 2.2  # over the bytes of the weights as they are loaded

# Runs the exporter in a process of its own and prints the largest resident set, mapped files included, in kilobytes.
MEASURE = """
import re, sys
from ovms_lora.export.cli import main

code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the shape of Llama 3.2 1B, in bf16 and three shards, with an adapter beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("billion")
    (folder / "base").mkdir()
    _, bos, eos = write_tokenizer(folder / "base")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="1GB")
    build_tiny_adapter(folder / "adapter", folder / "base", rank=16)
    return folder


@pytest.mark.parametrize(
    ("flags", "loaded_bytes"),
    [
        (["--weight-format", "int8"], 2),
        (["--weight-format", "int4", "--verify"], 2),
        (["--weight-format", "bf16"], 2),
        (["--weight-format", "int8", "--adapter", "ADAPTER"], 4),
    ],
    ids=["int8", "int4-verified", "bf16", "int8-merged"],
)
def test_the_peak_is_bounded_by_the_weights(
    billion: Path, workshop: Workshop, flags: list[str], loaded_bytes: int
) -> None:
    words = [word.replace("ADAPTER", str(billion / "adapter")) for word in flags]
    command = [sys.executable, "-c", MEASURE, *workshop.arguments(billion / "base", *words)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1]) * 1024
    stored = sum(path.stat().st_size for path in (billion / "base").glob("*.safetensors"))
    ratio = peak / (stored * loaded_bytes / 2)
    print(f"{ratio:.2f} times the weights, {peak / 1e9:.1f} GB")
    assert ratio <= BOUND
