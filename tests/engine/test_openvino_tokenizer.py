"""A model without tokenizer.json is tokenised by OpenVINO's graphs, as its tokenizer.json would."""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path

import openvino as ov
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine import tokenizer_graphs
from ovms_lora.engine.detokenizer import detokenizer
from ovms_lora.engine.openvino_tokenizer import OpenVinoTokenizer
from ovms_lora.engine.special_tokens import unmark
from ovms_lora.engine.tokenizer import Tokenizer
from ovms_lora.engine.tokenizer_graphs import without_tokens

GRAPHS = ("openvino_tokenizer.xml", "openvino_tokenizer.bin", "openvino_detokenizer.xml", "openvino_detokenizer.bin")
PARTS = [
    *("hello", " world", "  ", "     ", "12345", " 6", "\n", "\n\n ", "\t", "\r\n", "don't", " I'LL", "a" * 20, "~!@"),
    *("é", "e\u0301", "🙂", "漢字", "🧑\u200d🚀", "\U0001d573", "\u00a0", "\x00", "▁"),
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<tool_call>"),
]
TEXTS = ["", *PARTS, *("".join(random.Random(seed).choices(PARTS, k=2 + seed % 7)) for seed in range(300))]


def byte_level() -> tokenizers.Tokenizer:
    """Like Llama 3's: GPT-2's alphabet, digits apart, `<s>` before a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, hello words of the world"] * 9, trainer)
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return begun(backend)


def byte_fallback() -> tokenizers.Tokenizer:
    """Like Llama 2's: words begin with ▁, unknown characters are byte tokens, the first space of a text is dropped."""
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁", "w"), ("o", "r"), ("l", "d"), ("el", "lo"), ("▁h", "ello")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrd", *map("".join, merges)]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return begun(backend)


def begun(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def convert(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the graphs of a tokenizer as the exporter does."""
    openvino_tokenizers = pytest.importorskip("openvino_tokenizers")
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=16
    )
    encoder, decoder = openvino_tokenizers.convert_tokenizer(fast, with_detokenizer=True)
    ov.save_model(encoder, folder / GRAPHS[0])
    ov.save_model(decoder, folder / GRAPHS[2])


class Pair:
    """The same tokenizer from its tokenizer.json, and from its graphs alone."""

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path) -> None:
        self.json = Tokenizer(backend)
        self.graphs = Tokenizer.from_folder(folder)
        assert isinstance(self.graphs, OpenVinoTokenizer)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("graphs")
    convert(request.param(), folder)
    return Pair(request.param(), folder)


def check_same(pair: Pair, texts: list[str]) -> None:
    for text in texts:
        assert pair.graphs.encode(text) == pair.json.encode(text), repr(text)
        plain = pair.json.encode(text, add_special_tokens=False)
        assert pair.graphs.encode(text, add_special_tokens=False) == plain, repr(text)
        rendered = unmark(pair.json.special_tokens.mark(text) + "</s>")
        assert pair.graphs.encode_rendered(rendered) == pair.json.encode_rendered(rendered), repr(text)
        for skip in (True, False):
            shown = pair.json.decode(plain, skip_special_tokens=skip)
            assert pair.graphs.decode(plain, skip_special_tokens=skip) == shown, repr(text)


def test_texts_and_tokens_are_those_of_tokenizer_json(pair: Pair) -> None:
    check_same(pair, TEXTS)


def test_the_vocabulary_is_that_of_tokenizer_json(pair: Pair) -> None:
    assert pair.graphs.vocab_size == pair.json.vocab_size
    for token_id in range(pair.json.vocab_size):
        assert pair.graphs.token_bytes(token_id) == pair.json.token_bytes(token_id)
        assert pair.graphs.token_text(token_id) == pair.json.token_text(token_id)


@pytest.mark.parametrize("name", ["<s>", "</s>", "<tool_call>", "no such token"])
def test_tokens_are_found_by_name(pair: Pair, name: str) -> None:
    assert pair.graphs.token_id(name) == pair.json.token_id(name)


def test_special_tokens_can_be_inert(pair: Pair) -> None:
    eos = pair.graphs.token_id("</s>")
    assert eos in pair.graphs.encode("a</s>b")
    plain = pair.graphs.special_tokens.plain_ids[eos or 0]
    assert plain == pair.json.special_tokens.plain_ids[eos or 0] and eos not in plain
    rendered = unmark(pair.graphs.special_tokens.mark("a</s>b") + "</s>")
    assert pair.graphs.encode_rendered(rendered).count(eos or 0) == 1
    assert pair.graphs.token_id("<tool_call>") in pair.graphs.encode_rendered(unmark("<tool_call>"))


def test_a_text_is_not_cut_at_the_length_that_the_graph_names(pair: Pair) -> None:
    assert len(pair.graphs.encode("hello world " * 100)) > 100


def test_a_text_grows_token_by_token(pair: Pair) -> None:
    text = "hello 🙂 漢字 world"
    token_ids = pair.graphs.encode(text, add_special_tokens=False)
    growing = detokenizer(pair.graphs, [])
    pieces = [growing.add(token_id) for token_id in token_ids]
    assert "".join(pieces) + growing.flush() == text


def test_ids_outside_of_the_vocabulary_have_no_text(pair: Pair) -> None:
    assert pair.graphs.decode([10**6]) == pair.json.decode([10**6]) == ""


def test_many_threads_tokenise_at_once(pair: Pair) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        for text in random.Random(seed).sample(TEXTS, 50):
            token_ids = pair.graphs.encode(text)
            if token_ids != pair.json.encode(text) or pair.graphs.decode(token_ids) != pair.json.decode(token_ids):
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_long_text_does_not_hold_up_short_ones(pair: Pair) -> None:
    """The event loop encodes short texts itself, beside a thread that has a prompt of a megabyte."""
    long = threading.Thread(target=pair.graphs.encode, args=(" hello" * 175_000,))
    begun = time.perf_counter()
    long.start()
    waited = 0.0
    while long.is_alive():
        before = time.perf_counter()
        pair.graphs.encode("hello world")
        waited = max(waited, time.perf_counter() - before)
    assert waited < 0.5
    assert time.perf_counter() - begun < 60


@pytest.mark.parametrize("part", [" ", "a", "'", "1", "\n", "<s>", "<", "漢", "\x00", "hello "])
def test_no_megabyte_takes_long(pair: Pair, part: str) -> None:
    text = part * ((1 << 20) // len(part.encode()))
    begun = time.perf_counter()
    token_ids = pair.graphs.encode(text, add_special_tokens=False)
    assert time.perf_counter() - begun < 20
    assert pair.graphs.decode(token_ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        (r"(\<s\>|\<\|end\|\>|\<tool\>)", r"(\<tool\>)"),
        (r"(?:\s*)(\<s\>)|(\<tool\>)(?:\s*)", r"(\<tool\>)(?:\s*)"),
        (r"(?:\s*)(\<s\>|\(\\\))(?:\s*)", r"(?:\s*)(\(\\\))(?:\s*)"),
        (r"(\<s\>)", "((?!))"),
    ],
)
def test_tokens_are_taken_out_of_a_pattern(pattern: str, left: str) -> None:
    assert without_tokens(pattern, {"<s>", "<|end|>"}) == left


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert(byte_level(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["openvino_detokenizer.xml", "openvino_detokenizer.bin", "openvino_tokenizer.bin"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelFolderError) as refused:
        Tokenizer.from_folder(folder)
    assert name.split(".", maxsplit=1)[0] in refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.hint


def test_a_graph_of_another_kind_is_refused(folder: Path) -> None:
    for suffix in ("xml", "bin"):
        shutil.copy(folder / f"openvino_detokenizer.{suffix}", folder / f"openvino_tokenizer.{suffix}")
    with pytest.raises(ModelFolderError, match="not one StringTensorUnpack") as refused:
        Tokenizer.from_folder(folder)
    assert refused.value.hint


def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"neither tokenizer\.json nor openvino_tokenizer\.xml"):
        Tokenizer.from_folder(tmp_path)


def test_without_the_package_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizer_graphs._operations.cache_clear()
    with pytest.raises(ModelFolderError, match="needs the package openvino-tokenizers") as refused:
        Tokenizer.from_folder(folder)
    assert refused.value.hint is not None
    assert "install" in refused.value.hint
