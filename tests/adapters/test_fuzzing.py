"""Whatever an adapter folder holds: it loads or is refused with a typed error, at once and in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.adapters.adapter import load_adapter
from ovms_lora.adapters.peft_config import CONFIG_NAME
from ovms_lora.adapters.safetensors_file import WEIGHTS_NAME
from ovms_lora.core.errors import AdapterError
from tests.adapters.adapter_files import tiny_base
from tests.adapters.fuzzing import CORPUS, corpus, fuzz, violation

SEEDS = corpus()
GOOD = [name for name in SEEDS if name.startswith("good")]


@pytest.mark.parametrize("name", SEEDS)
def test_the_corpus_keeps_every_promise(name: str, tmp_path: Path) -> None:
    assert violation(SEEDS[name], tmp_path) is None


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_good_loads_and_what_is_bad_does_not(name: str, tmp_path: Path) -> None:
    for file, data in SEEDS[name].items():
        (tmp_path / file).write_bytes(data)
    if name in GOOD:
        assert load_adapter(tmp_path, tiny_base(), max_lora_rank=64, lora_dtype=np.float32).layers
    else:
        with pytest.raises(AdapterError):
            load_adapter(tmp_path, tiny_base(), max_lora_rank=64, lora_dtype=np.float32)


@pytest.mark.parametrize("cut", [CONFIG_NAME, WEIGHTS_NAME, "tokenizer_config.json", "chat_template.jinja"])
def test_every_cut_of_every_file_keeps_them(cut: str, tmp_path: Path) -> None:
    folder = SEEDS["good_with_template"]
    for length in range(len(folder[cut])):
        assert violation(folder | {cut: folder[cut][:length]}, tmp_path) is None


def test_mutations_keep_them(tmp_path: Path) -> None:
    tried, found = fuzz(20, seed=7, place=tmp_path)
    assert not found, found[0]
    assert tried > 500


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 256 << 10
    assert all(json.loads(path.read_text()) for path in CORPUS.iterdir())
