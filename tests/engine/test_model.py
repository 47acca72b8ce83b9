"""What a model folder says of itself: generation defaults, end-of-sequence tokens, length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.graph_pbtxt import render_graph
from ovms_lora.engine.model import read_generation_defaults, read_max_model_len, read_options


def write(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_defaults_come_from_generation_config(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", temperature=0.5, top_k=7, eos_token_id=[2, 3])
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_k, defaults.eos_token_ids) == (0.5, 7, (2, 3))
    assert defaults.top_p is None


@pytest.mark.parametrize(
    ("written", "read"), [(True, True), (False, False), ("never", "never"), ("always", None), (1, None)]
)
def test_the_rule_to_stop_a_beam_search(tmp_path: Path, written: object, read: object) -> None:
    write(tmp_path, "generation_config.json", early_stopping=written, length_penalty=0.5)
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.early_stopping, defaults.length_penalty) == (read, 0.5)


def test_the_graph_may_name_another_file(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", temperature=0.5)
    write(tmp_path, "other.json", temperature=0.9)
    assert read_generation_defaults(tmp_path, "other.json").temperature == 0.9


def test_a_named_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"gone\.json is not a file"):
        read_generation_defaults(tmp_path, "gone.json")


def test_the_end_of_sequence_may_stand_in_config_json(tmp_path: Path) -> None:
    write(tmp_path, "config.json", eos_token_id=5, max_position_embeddings=99)
    assert read_generation_defaults(tmp_path).eos_token_ids == (5,)
    assert read_max_model_len(tmp_path) == 99


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="generation_config"):
        read_generation_defaults(tmp_path)


def test_a_missing_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a folder"):
        read_options(tmp_path / "gone")


def test_unknown_parsers_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "graph.pbtxt").write_text(render_graph(EngineOptions(tool_parser="hermes3", reasoning_parser="qwen3")))
    assert read_options(tmp_path)[1].tool_parser == "hermes3"
    (tmp_path / "graph.pbtxt").write_text(render_graph(EngineOptions(tool_parser="hermes")))
    with pytest.raises(ModelFolderError, match="unknown tool_parser 'hermes'") as refused:
        read_options(tmp_path)
    assert refused.value.hint and "hermes3" in refused.value.hint
