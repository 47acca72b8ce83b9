"""A text that grows token by token is the text of all tokens, and never shows half a character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer, detokenizer
from ovms_lora.engine.tokenizer import Tokenizer
from tests.fakes import EOS, byte_tokenizer

REPLACEMENT = "�"
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!"


def sentencepiece_tokenizer() -> Tokenizer:
    """Like Llama 2's: words begin with ▁, unknown characters are byte tokens, the first space of a text is dropped."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    model = models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<unk>", "<s>"])
    return Tokenizer(backend)


def metaspace_tokenizer() -> Tokenizer:
    """Like T5's: whole words with their space in front, and a decoder that joins them."""
    words = ["▁hello", "▁world", "▁a", "b", "c", "▁"]
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in words)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


BYTES, PIECES, WORDS = byte_tokenizer(), sentencepiece_tokenizer(), metaspace_tokenizer()


def pieces_of(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    return pieces_from(detokenizer(tokenizer, prompt), tokens)


def pieces_from(text: Detokenizer, tokens: Sequence[int]) -> list[str]:
    return [*(text.add(token) for token in tokens), text.flush()]


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=25) | st.text(
    "a é你😀 ", max_size=25
)


@given(prompt=TEXTS, text=TEXTS)
@settings(max_examples=200)
def test_bytes_one_by_one_give_the_whole_text(prompt: str, text: str) -> None:
    pieces = pieces_of(BYTES, list(prompt.encode()), list(text.encode()))
    assert "".join(pieces) == text
    assert REPLACEMENT not in "".join(pieces[:-1])


@given(
    tokens=st.lists(st.sampled_from([*b"a\x80\xbf\xc3\xe4\xbd\xa0\xf0\x9f\x98\xff"]) | st.integers(0, 255), max_size=16)
)
@settings(max_examples=300)
def test_bytes_that_are_no_text_give_what_the_whole_gives(tokens: list[int]) -> None:
    assert "".join(pieces_of(BYTES, [], tokens)) == bytes(tokens).decode(errors="replace")


@given(prompt=TEXTS, text=TEXTS)
@settings(max_examples=200)
def test_byte_fallback_gives_the_text_of_prompt_and_output_together(prompt: str, text: str) -> None:
    before = PIECES.encode(prompt or "a", add_special_tokens=False)
    after = PIECES.encode(text, add_special_tokens=False) if text else []
    assert "".join(pieces_of(PIECES, before, after)) == text_after(PIECES, before, after)


def test_characters_of_byte_tokens_come_out_one_by_one_however_many_follow() -> None:
    prompt, tokens = PIECES.encode("say 你😀"), PIECES.encode("😀你😀é😀😀")[1:]
    pieces = [piece for piece in pieces_of(PIECES, prompt, tokens) if piece]
    assert pieces == ["😀", "你", "😀", "é", "😀", "😀"]


@pytest.mark.parametrize("tokenizer", [PIECES, WORDS])
def test_the_space_after_the_prompt_is_kept(tokenizer: Tokenizer) -> None:
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("world")
    assert "".join(pieces_of(tokenizer, prompt, answer)) == " world"


def test_the_first_space_of_a_text_without_a_prompt_is_the_decoders() -> None:
    assert "".join(pieces_of(WORDS, [], WORDS.encode("hello world"))) == "hello world"


def test_half_a_character_comes_out_as_a_replacement_only_at_the_end() -> None:
    assert pieces_of(BYTES, [], [*b"a\xf0\x9f"]) == ["a", "", "", REPLACEMENT]


def test_endless_bytes_that_are_no_text_come_out_all_the_same() -> None:
    pieces = pieces_from(WindowDetokenizer(BYTES, []), [0x80] * 40 + [97])
    assert "".join(pieces) == REPLACEMENT * 40 + "a"
    assert pieces[16 - 1] == REPLACEMENT * 16
    assert pieces_of(BYTES, [], [0x80] * 40 + [97]) == [REPLACEMENT] * 40 + ["a", ""]


@given(prompt=TEXTS, text=TEXTS, skip=st.booleans())
@settings(max_examples=200)
def test_joined_bytes_and_windows_give_the_same_text(prompt: str, text: str, skip: bool) -> None:
    before, after = [*prompt.encode(), EOS], [EOS, *text.encode(), EOS, 10**6]
    kinds = (kind(BYTES, before[-9:], skip_special_tokens=skip) for kind in (ByteDetokenizer, WindowDetokenizer))
    joined, windows = ("".join(pieces_from(kind, after)) for kind in kinds)
    assert joined == windows


def test_a_character_that_the_prompt_began_is_completed() -> None:
    assert pieces_of(BYTES, list("x😀".encode())[:-2], list("😀y".encode())[2:]) == ["", "😀", "y", ""]


def test_a_fork_goes_on_by_itself() -> None:
    first = detokenizer(BYTES, [])
    first.add(0xC3)
    second = first.fork()
    assert (first.add(0xA9), second.add(0xA8)) == ("é", "è")


def test_an_added_token_is_decoded_as_tokenizers_does() -> None:
    backend = byte_tokenizer()._backend
    backend.add_tokens(["<tool>", "two words", "é x", "Ġé"])
    tokenizer = Tokenizer(backend)
    for token in ("<tool>", "two words", "é x", "Ġé"):
        number = tokenizer.token_id(token)
        assert number is not None
        assert "".join(pieces_of(tokenizer, [97], [number])) == tokenizer.decode([number])


def test_a_replacement_character_that_the_model_writes_comes_out() -> None:
    assert "".join(pieces_of(BYTES, [], list(f"a{REPLACEMENT}b".encode()))) == f"a{REPLACEMENT}b"


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a</s>b")])
def test_special_tokens_are_in_the_text_when_they_are_not_skipped(skip: bool, text: str) -> None:
    growing = detokenizer(BYTES, [], skip_special_tokens=skip)
    assert "".join(growing.add(token) for token in (97, EOS, 98)) == text


def test_flushing_twice_gives_nothing_more() -> None:
    growing = detokenizer(BYTES, [])
    growing.add(0xC3)
    assert [growing.flush(), growing.flush()] == [REPLACEMENT, ""]


# The tokenizer of a folder.


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"neither tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", b'{"model": {"type": "None"}}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match="is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_truncates_and_pads_no_longer_does(tmp_path: Path) -> None:
    backend = byte_tokenizer()._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("hello") == list(b"hello")
    assert (tokenizer.vocab_size, tokenizer.token_id("</s>"), tokenizer.token_text(EOS)) == (257, EOS, "</s>")
    assert tokenizer.token_id("nothing") is None
