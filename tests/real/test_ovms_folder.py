"""SmolLM2 as OVMS's own exporter leaves it, without tokenizer.json: its graphs tokenise as tokenizer.json does."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms_lora.engine.openvino_tokenizer import OpenVinoTokenizer
from ovms_lora.engine.tokenizer import Detokenizer, Tokenizer
from tests.engine.test_openvino_tokenizer import TEXTS

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def without_json(exact_base: Path, tmp_path: Path) -> Path:
    """The same folder, but for tokenizer.json."""
    for file in exact_base.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    return tmp_path


def test_tokens_and_texts_are_those_of_tokenizer_json(exact_base: Path, without_json: Path) -> None:
    json, graphs = Tokenizer.from_folder(exact_base), Tokenizer.from_folder(without_json)
    assert isinstance(graphs, OpenVinoTokenizer)
    assert graphs.vocab_size == json.vocab_size
    for text in TEXTS:
        token_ids = json.encode(text)
        assert graphs.encode(text) == token_ids, repr(text)
        assert graphs.encode_inert(text) == json.encode_inert(text), repr(text)
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
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("In 1815"))
        token_ids = tokenizer.encode(" the 3 ships: 漢字 🧑\u200d🚀 é <|im_end|> done", add_special_tokens=False)
        grown.append([detokenizer.add(token_id) for token_id in token_ids] + [detokenizer.flush()])
    assert grown[0] == grown[1]
