"""Tokenizer: text to token ids and back, from a model folder's tokenizer.json, or from OpenVINO's graphs.

The text of a growing sequence is `detokenizer`'s. Knows no templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.special_tokens import SpecialTokens, Unmarked
from ovms_lora.engine.token_bytes import byte_level_bytes, decoded_byte_level, sentencepiece_bytes


class Tokenizer:
    """A thin, typed front of `tokenizers.Tokenizer`; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._decoded: dict[int, bytes] = {}
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

    @cached_property
    def joins_bytes(self) -> bool:
        """Whether a text is just the bytes of its tokens one after another, as `decoded_bytes` gives them."""
        return isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel)

    def decoded_bytes(self, token_id: int) -> bytes:
        """Return what `decode` makes of a token where `joins_bytes`; nothing of an id that names no token."""
        known = self._decoded.get(token_id)
        if known is None:
            piece: str | None = self._backend.id_to_token(token_id)
            known = self._decoded[token_id] = decoded_byte_level(piece) if piece else b""
        return known

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, of which texts hold nothing unless that is asked for."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

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


def _special_tokens(backend: tokenizers.Tokenizer) -> SpecialTokens:
    texts = {number: token.content for number, token in backend.get_added_tokens_decoder().items() if token.special}
    backend.encode_special_tokens = True
    plain_ids = {number: backend.encode(text, add_special_tokens=False).ids for number, text in texts.items()}
    backend.encode_special_tokens = False
    return SpecialTokens(texts, plain_ids)
