"""SmolLM2 in a repository as OVMS's own exporter leaves it, without tokenizer.json, is served as it is."""

from __future__ import annotations

import queue
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.check import check
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.request import SequenceOutput
from ovms_lora.engine.detokenizer import detokenizer
from ovms_lora.engine.model import load_model
from ovms_lora.engine.openvino_tokenizer import OpenVinoTokenizer
from ovms_lora.engine.special_tokens import unmark
from ovms_lora.engine.tokenizer import Tokenizer
from ovms_lora.server.model_source import ConfigFile
from tests import ovms_repository
from tests.engine.test_openvino_tokenizer import TEXTS
from tests.real.client import Client

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def without_json(exact_base: Path, tmp_path: Path) -> Path:
    """The same folder, but for tokenizer.json."""
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for file in exact_base.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    return folder


def test_tokens_and_texts_are_those_of_tokenizer_json(exact_base: Path, without_json: Path) -> None:
    json, graphs = Tokenizer.from_folder(exact_base), Tokenizer.from_folder(without_json)
    assert isinstance(graphs, OpenVinoTokenizer)
    assert graphs.vocab_size == json.vocab_size
    for text in TEXTS:
        token_ids = json.encode(text)
        assert graphs.encode(text) == token_ids, repr(text)
        rendered = unmark(json.special_tokens.mark(text) + "<|im_end|>")
        assert graphs.encode_rendered(rendered) == json.encode_rendered(rendered), repr(text)
        assert graphs.decode(token_ids) == json.decode(token_ids), repr(text)
        assert graphs.decode(token_ids[1:3], skip_special_tokens=False) == json.decode(
            token_ids[1:3], skip_special_tokens=False
        )


def test_every_token_has_the_bytes_of_tokenizer_json(exact_base: Path, without_json: Path) -> None:
    json, graphs = Tokenizer.from_folder(exact_base), Tokenizer.from_folder(without_json)
    assert all(graphs.token_bytes(token) == json.token_bytes(token) for token in range(json.vocab_size))


def test_a_growing_text_is_the_same(exact_base: Path, without_json: Path) -> None:
    grown = []
    for folder in (exact_base, without_json):
        tokenizer = Tokenizer.from_folder(folder)
        growing = detokenizer(tokenizer, tokenizer.encode("In 1815"))
        token_ids = tokenizer.encode(" the 3 ships: 漢字 🧑\u200d🚀 é <|im_end|> done", add_special_tokens=False)
        grown.append([growing.add(token_id) for token_id in token_ids] + [growing.flush()])
    assert grown[0] == grown[1]


def test_a_repository_of_ovms_is_served_as_it_is(exact_base: Path, without_json: Path, tmp_path: Path) -> None:
    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "prompt_lookup": True}
    options: dict[str, Any] = {"enable_prefix_caching": True, "cache_size": 1, "max_num_seqs": 8, "device": "CPU"}
    (without_json / "graph.pbtxt").unlink()
    (without_json / "graph.pbtxt").write_text(ovms_repository.graph(plugin_config=precise, **options))
    (spec,) = ConfigFile(ovms_repository.write_config(tmp_path, without_json.name)).read()
    answers = []
    for folder in (exact_base, spec.folder):
        outputs: queue.SimpleQueue[Sequence[SequenceOutput]] = queue.SimpleQueue()
        model = load_model(folder, deliver=outputs.put)
        try:
            answers.append(Client(model, outputs).ask("The capital of France is"))
        finally:
            model.engine.stop()
    assert model.options.max_num_seqs == 8
    assert model.options.plugin_config == {key: value for key, value in precise.items() if key != "prompt_lookup"}
    assert answers[0] == answers[1] != ""


def test_it_passes_the_check(without_json: Path, tmp_path: Path) -> None:
    *_, summary = check(ovms_repository.write_config(tmp_path, without_json.name))
    assert summary.endswith("1 models can be served")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"models_path": "./gone"}, "models_path './gone'"),
        ({"pipeline_type": "VLM_CB"}, "pipeline_type VLM_CB"),
        ({"plugin_config": {"NO_SUCH_PROPERTY": 1}}, "does not compile for CPU"),
        ({"device": "NPU"}, "does not compile for NPU"),
        ({"generation_config_path": "gone.json"}, "gone.json is not a file"),
    ],
)
def test_what_cannot_be_honoured_is_refused(without_json: Path, written: dict[str, Any], message: str) -> None:
    (without_json / "graph.pbtxt").unlink()
    (without_json / "graph.pbtxt").write_text(ovms_repository.graph(**written))
    with pytest.raises(ModelFolderError, match=re.escape(message)) as refused:
        load_model(without_json, deliver=lambda outputs: None)
    assert "\n" not in refused.value.message
    assert refused.value.hint
