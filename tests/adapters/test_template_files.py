"""An adapter's own chat template is read as what it is: text of a stranger."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.adapters.adapter import Adapter, load_adapter
from ovms_lora.core.chat_template import TemplateSource
from ovms_lora.core.errors import AdapterError, AdapterErrorCode
from tests.adapters.adapter_files import tiny_base, write_adapter

JINJA = "chat_template.jinja"
CONFIG = "tokenizer_config.json"


def load(folder: Path) -> Adapter:
    return load_adapter(folder, tiny_base(), max_lora_rank=64, lora_dtype=np.float32)


def test_most_adapters_have_none(tmp_path: Path) -> None:
    assert load(write_adapter(tmp_path)).chat_template is None
    (tmp_path / CONFIG).write_text('{"bos_token": "<s>"}')
    assert load(tmp_path).chat_template is None


def test_a_template_comes_with_its_special_tokens(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / CONFIG).write_text('{"bos_token": "<s>", "chat_template": "config"}')
    assert load(tmp_path).chat_template == TemplateSource("config", None, {"bos_token": "<s>"})
    (tmp_path / JINJA).write_text("file é")
    assert load(tmp_path).chat_template == TemplateSource("file é", None, {"bos_token": "<s>"})


def test_it_belongs_to_the_adapters_identity(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    digests = [load(tmp_path).digest]
    for text in ("a", "b"):
        (tmp_path / JINJA).write_text(text)
        digests.append(load(tmp_path).digest)
    (tmp_path / JINJA).unlink()
    assert len(set(digests)) == 3
    assert load(tmp_path).digest == digests[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (JINJA, b"\xff", "not UTF-8"),
        (JINJA, b"x" * (300 << 10), "larger than"),
        (CONFIG, b"{", "not valid JSON"),
        (CONFIG, b"[]", "not an object"),
        (CONFIG, b'{"a": 1, "a": 2}', "stands twice"),
        (CONFIG, b"[" * 10_000, "nested too deeply"),
        (CONFIG, b"[" * 100_000, "more than 20000 objects"),
        (CONFIG, b'{"a": [' + b"1," * 1_900_000 + b"1]}", "more than 80000 values"),
        (CONFIG, b" " * (9 << 20), "larger than"),
        (CONFIG, json.dumps({"chat_template": "x" * (300 << 10)}).encode(), "larger than"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message) as refused:
        load(tmp_path)
    assert refused.value.code is AdapterErrorCode.CONFIG_INVALID


@pytest.mark.parametrize("name", [JINJA, CONFIG])
def test_links_and_pipes_are_refused(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "linked")
    (tmp_path / "target").write_text("{}")
    (tmp_path / "linked" / name).symlink_to(tmp_path / "target")
    with pytest.raises(AdapterError, match="symbolic link"):
        load(tmp_path / "linked")
    write_adapter(tmp_path / "piped")
    os.mkfifo(tmp_path / "piped" / name)
    with pytest.raises(AdapterError, match="not a regular file"):
        load(tmp_path / "piped")
