"""A draft model is exported into the folder of its model, where the graph names it; one of other tokens is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovms_lora.check import check
from ovms_lora.core.errors import ExportError, ModelFolderError
from ovms_lora.core.graph_pbtxt import parse_graph
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.export.draft import check_same_tokens
from ovms_lora.export.manifest import read_manifest
from tests.export.conftest import Fails, Sources, Workshop
from tests.tiny_llama import build_tiny_llama


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("org") / "small"
    build_tiny_llama(folder, seed=5, hidden=32)
    return folder


def test_a_draft_model_lies_in_the_folder_of_its_model(
    workshop: Workshop, sources: Sources, small: Path, fails: Fails
) -> None:
    flags = ["--draft_source_model", str(small), "--model_name", "m"]
    assert workshop.export(sources.base, *flags) == 0
    folder = workshop.repository / "m"
    graph = parse_graph((folder / "graph.pbtxt").read_text())
    assert graph.options.speculation == SpeculationOptions(draft_models_path="./small")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert {"openvino_model.bin", "small/openvino_model.bin", "small/tokenizer.json"} <= manifest.files.keys()
    assert workshop.models == ["m"]
    assert list(check(folder))
    assert workshop.export(sources.base, *flags) == 0  # it is there already
    cause, _ = fails(sources.base, "--model_name", "m")
    assert "draft model: " in cause
    tokenizer = json.loads((folder / "small" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<more>"})
    (folder / "small" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFolderError, match=r"the draft model .* has 301 tokens, not 300"):
        list(check(folder))


def test_a_draft_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    def write(folder: Path, tokens: list[str]) -> None:
        vocabulary = {token: place for place, token in enumerate(tokens)}
        text = json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
        )
        (folder / "tokenizer.json").write_text(text)

    other = tmp_path / "other"
    other.mkdir()
    write(tmp_path, ["a", "b", "c"])
    write(other, ["a", "c", "b"])
    with pytest.raises(ExportError, match=r"other tokens than the model: '[bc]' with id 1") as error:
        check_same_tokens(tmp_path, other)
    assert "same tokenizer" in (error.value.hint or "")
    write(other, ["a", "b", "c"])
    check_same_tokens(tmp_path, other)


def test_lookups_are_written_as_ovms_has_them(workshop: Workshop, sources: Sources, quick: None) -> None:
    assert workshop.export(sources.base, "--model_name", "m", "--prompt_lookup_decoding") == 0
    text = (workshop.repository / "m" / "graph.pbtxt").read_text()
    assert "prompt_lookup" in text
    assert parse_graph(text).options.speculation == SpeculationOptions()


def test_a_plan_names_the_draft_model(
    workshop: Workshop, sources: Sources, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        workshop.export(sources.base, "--dry_run", "--draft_source_model", str(small), "--draft_model_name", "d") == 0
    )
    assert f"draft     {small} with int8 weights, to d/ in the same folder" in capsys.readouterr().out
