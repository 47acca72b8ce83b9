"""Graphs that are kept for the next start: the same numbers from them, and anew whatever is of no use."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine import kept_graph
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.runner import OpenVinoRunner
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence as Tokens
from tests.engine.lora_models import PRECISE, Ask, Base, Bases, prompt, serving

_LENGTHS = (40, 3, 17)


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    return bases.get("llama")


def source(folder: Path, cache: Path | None, **properties: Any) -> GraphSource:
    kept = {"CACHE_DIR": str(cache)} if cache else {}
    return GraphSource(folder, EngineOptions(plugin_config={**PRECISE, **properties, **kept}))


def logits(graphs: GraphSource) -> list[npt.NDArray[np.float32]]:
    """What three prompts give, and the next two tokens of each, computed together."""
    options = EngineOptions(plugin_config=PRECISE, max_num_seqs=4)
    runner = OpenVinoRunner(graphs.compile(), options, max_model_len=128)
    found = []
    sequences = []
    for number, length in enumerate(_LENGTHS):
        request = GenerationRequest(str(number), prompt(length + 2), SamplingParams())
        sequences.append(Tokens(request, 0))
        sequences[-1].blocks = [2 * number, 2 * number + 1]
    for past in range(3):
        chunks = [
            Chunk(sequence, length + past - 1, 1, 1) if past else Chunk(sequence, 0, length, 1)
            for sequence, length in zip(sequences, _LENGTHS, strict=True)
        ]
        found.append(np.array(runner.run(chunks)))
    return found


def same(one: Sequence[npt.NDArray[np.float32]], other: Sequence[npt.NDArray[np.float32]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def kept_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2"])
def test_a_kept_graph_gives_the_same_logits_to_the_bit(bases: Bases, name: str, tmp_path: Path) -> None:
    folder = bases.get(name).folder
    expected = logits(source(folder, None))
    first = logits(source(folder, tmp_path))
    assert len(kept_in(tmp_path)) == 1
    again = source(folder, tmp_path)
    assert same(first, expected)
    assert same(logits(again), expected)


def test_a_kept_graph_is_used_and_the_ir_not_read(llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(llama.folder, tmp_path).compile()
    monkeypatch.setattr("ovms_lora.engine.graph_source.read_paged_model", lambda *_: pytest.fail("read"))
    source(llama.folder, tmp_path).compile()


def test_answers_with_adapters_are_the_same_after_a_second_start(llama: Base, tmp_path: Path) -> None:
    adapters = {"a": llama.adapter(tmp_path / "a", target_modules=["q_proj", "up_proj"])}
    texts = []
    for _ in range(2):
        with serving(llama.folder, adapters, plugin_config={**PRECISE, "CACHE_DIR": str(tmp_path / "c")}) as model:
            asks = (Ask(prompt(9)), Ask(prompt(9), model.lora.select("a")), Ask(prompt(20)))
            texts.append((model.tokens(*asks), model.alone(*asks)))
    assert texts[0] == texts[1]
    assert len(kept_in(tmp_path / "c")) == 1


def test_another_ir_or_property_is_another_graph(llama: Base, tmp_path: Path) -> None:
    copy, cache = tmp_path / "copy", tmp_path / "cache"
    shutil.copytree(llama.folder, copy)
    source(copy, cache).compile()
    source(copy, cache, INFERENCE_NUM_THREADS=1).compile()
    assert len(kept_in(cache)) == 2
    weights = copy / "openvino_model.bin"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    source(copy, cache).compile()
    assert len(kept_in(cache)) == 3


@pytest.mark.parametrize("missing", ["openvino_model.xml", "openvino_model.bin"])
@pytest.mark.parametrize("adapters", [None, {}])
@pytest.mark.parametrize("kept", [{}, {"CACHE_DIR": "cache"}])
def test_a_folder_without_its_model_is_refused(
    llama: Base, tmp_path: Path, missing: str, adapters: dict[str, Path] | None, kept: dict[str, str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama.folder, folder)
    (folder / missing).unlink()
    with (
        pytest.raises(ModelFolderError, match=f"holds no {missing}"),
        serving(folder, adapters, plugin_config={**PRECISE, **kept}),
    ):
        pytest.fail("served")


@pytest.mark.parametrize("name", ["graph.xml", "graph.bin", "heads.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"<net/>"])
def test_a_graph_of_no_use_is_made_anew(
    llama: Base, tmp_path: Path, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(source(llama.folder, tmp_path))
    (kept,) = kept_in(tmp_path)
    path = tmp_path / kept / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert same(logits(source(llama.folder, tmp_path)), expected)
    assert "holds no usable graph" in caplog.text
    caplog.clear()
    assert same(logits(source(llama.folder, tmp_path)), expected)
    assert not caplog.text
    assert kept_in(tmp_path) == [kept]


def test_where_nothing_can_be_kept_models_are_served_all_the_same(
    llama: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "file" / "cache"
    cache.parent.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        source(llama.folder, cache).compile()
    assert "the graph is not kept" in caplog.text


def test_what_memory_does_not_hold_twice_is_not_kept(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovms_lora.engine.graph_source.available_memory", lambda: 1000)
    source(llama.folder, tmp_path).compile()
    assert kept_in(tmp_path) == []


def test_what_cannot_be_written_leaves_nothing(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_graph, "_write", full)
    source(llama.folder, tmp_path).compile()
    assert "No space left on device" in caplog.text
    assert kept_in(tmp_path) == []


def test_two_servers_that_start_at_once_keep_one(llama: Base, tmp_path: Path) -> None:
    one, other = source(llama.folder, tmp_path).prepare(), source(llama.folder, tmp_path).prepare()
    one()
    other()
    assert len(kept_in(tmp_path)) == 1
