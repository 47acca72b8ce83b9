"""Tokenizer: text to token ids and back, from a model folder's tokenizer.json, or from OpenVINO's graphs.

`Detokenizer` gives the text of a growing sequence piece by piece, never half a character. Knows no templates.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.special_tokens import SpecialTokens, Unmarked
from ovms_lora.engine.token_bytes import byte_level_bytes, sentencepiece_bytes

_REPLACEMENT = "�"
_CHARACTER = 4  # bytes, and so tokens, of the longest character
_MOST_OPEN = 16  # more tokens than this are no character; holding them back would cost more with each one


class Tokenizer:
    """A thin, typed front of `tokenizers.Tokenizer`; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = _special_tokens(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, or openvino_tokenizer.xml and its counterpart where that is missing.

        Raises ModelFolderError when there is neither, or what there is is broken.
        """
        path = folder / "tokenizer.json"
        if not path.is_file() and (folder / "openvino_tokenizer.xml").is_file():
            from ovms_lora.engine.openvino_tokenizer import OpenVinoTokenizer  # it is a Tokenizer itself

            return OpenVinoTokenizer.from_folder(folder)
        if not path.is_file():
            raise ModelFolderError(
                f"{folder} holds neither tokenizer.json nor openvino_tokenizer.xml",
                hint="export the model with its tokenizer",
            )
        try:
            return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise ModelFolderError(f"{path} is not a tokenizer: {error}", hint="export the model again") from error

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, added tokens included."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def to_json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        # The batch call, unlike the single one, lets other threads run while it works.
        encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encodings[0].ids
        return token_ids

    def encode_rendered(self, rendered: Unmarked) -> list[int]:
        """Return the token ids of a text that a chat template has written, special tokens included.

        Where the text was marked as a client's, it holds none.
        """
        if not rendered.places:
            return self.encode(rendered.text, add_special_tokens=False)
        encoding = self._backend.encode_batch([rendered.text], add_special_tokens=False)[0]
        token_ids: list[int] = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            plain = self.special_tokens.plain_ids.get(token_id)
            span = rendered.text[start:end]
            before, after = len(span) - len(span.lstrip()), len(span.rstrip())  # some tokens take the space around them
            if plain is None or not rendered.inside(start + before, start + after):
                token_ids.append(token_id)
            else:
                token_ids += self._plain(span[:before]) + plain + self._plain(span[after:])
        return token_ids

    def _plain(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False) if text else []

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that form no character become U+FFFD."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; a special token stands for its name."""
        piece: str = self._backend.id_to_token(token_id)
        if token_id in self._added:
            return piece.encode()
        return byte_level_bytes(piece) if self._is_byte_level else sentencepiece_bytes(piece)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact name in the vocabulary, None when there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return b"ByteLevel" in self._backend.decoder.__getstate__() if self._backend.decoder else False


class Detokenizer:
    """Text of one sequence, token by token.

    A token may hold part of a character, and some tokenizers write a token differently after another one. So the text
    of a window of recent tokens is taken with and without the new tokens, and what is longer is new; while it ends in
    an incomplete character, nothing is given out.
    """

    # Enough for what a decoder looks back on: a leading space that is dropped only at the beginning of a text.
    _CONTEXT = 5

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._open: list[int] = []
        self._remember(list(prompt[-self._CONTEXT - _CHARACTER :]))

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that it completes, perhaps none."""
        self._open.append(token_id)
        text = self._decode(self._known + self._open)
        if text.endswith(_REPLACEMENT) and len(self._open) < _MOST_OPEN:
            return ""
        return self._settle(text)

    def fork(self) -> Detokenizer:
        """Return another one that goes on from here."""
        other = copy.copy(self)
        other._open = list(self._open)
        return other

    def flush(self) -> str:
        """Return the text that is still held back; what never became a character is given as U+FFFD."""
        return self._settle(self._decode(self._known + self._open)) if self._open else ""

    def _settle(self, text: str) -> str:
        new = text[len(self._known_text) :]
        self._remember(self._known + self._open)
        self._open = []
        return new

    def _remember(self, token_ids: list[int]) -> None:
        """Keep the last tokens as the window, beginning with a whole character where there is one.

        Decoders with byte fallback write a run of byte tokens as U+FFFD as a whole when it begins within a character.
        """
        for size in range(self._CONTEXT, self._CONTEXT + _CHARACTER):
            self._known = token_ids[-size:]
            self._known_text = self._decode(self._known)
            if not self._known_text.startswith(_REPLACEMENT):
                break

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)


def _special_tokens(backend: tokenizers.Tokenizer) -> SpecialTokens:
    texts = {number: token.content for number, token in backend.get_added_tokens_decoder().items() if token.special}
    backend.encode_special_tokens = True
    plain_ids = {number: backend.encode(text, add_special_tokens=False).ids for number, text in texts.items()}
    backend.encode_special_tokens = False
    return SpecialTokens(texts, plain_ids)
