"""OpenVinoTokenizer: the Tokenizer of a model folder that has no tokenizer.json but OpenVINO's pair of graphs.

Owns running the graphs from several threads. What they are is in `tokenizer_graphs`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.core.errors import InvalidFieldError, ModelFolderError
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.special_tokens import SpecialTokens, Unmarked
from ovms_lora.engine.token_bytes import sentencepiece_bytes
from ovms_lora.engine.tokenizer import Tokenizer
from ovms_lora.engine.tokenizer_graphs import TokenizerGraphs

# Texts are encoded beside each other: the event loop's short ones never wait for a long one in a thread.
_STREAMS = "4"


class OpenVinoTokenizer(Tokenizer):
    """Gives what `Tokenizer` gives for the same model's tokenizer.json."""

    def __init__(self, graphs: TokenizerGraphs) -> None:
        """Compile all that may be needed: later it would hold up whoever needs it first. Raises ModelFolderError."""
        self._graphs = graphs
        self._pieces = graphs.vocabulary()
        self._special_ids = graphs.special_ids()
        self._joins_pieces = graphs.joins_pieces  # as byte-level decoders do; running a graph takes far longer
        self._ids = {piece: token_id for token_id, piece in reversed(list(enumerate(self._pieces)))}
        self._bare = self._adding = _Pool(graphs.text_encoder(add_special_tokens=False))
        if graphs.adds_special_tokens:
            self._adding = _Pool(graphs.text_encoder(add_special_tokens=True))
        inert = _Pool(graphs.text_encoder(add_special_tokens=False, inert=True))
        texts = {token_id: self._pieces[token_id].decode() for token_id in self._special_ids}
        plain_ids = {token_id: self._encode(inert, text) for token_id, text in texts.items()}
        self.special_tokens = SpecialTokens(texts, plain_ids)
        if not self._joins_pieces:
            self._skipping = _Pool(graphs.text_decoder(skip_special_tokens=True))
            self._showing = _Pool(graphs.text_decoder(skip_special_tokens=False))

    @classmethod
    def from_folder(cls, folder: Path) -> OpenVinoTokenizer:
        """Read both graphs. Raises ModelFolderError."""
        try:
            return cls(TokenizerGraphs.from_folder(folder))
        except RuntimeError as error:
            message = f"the tokenizer of {folder} cannot be compiled: {str(error).strip().splitlines()[-1]}"
            raise ModelFolderError(message, hint="export the tokenizer again") from error

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, added tokens included."""
        return len(self._pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        return self._encode(self._adding if add_special_tokens else self._bare, text)

    def encode_rendered(self, rendered: Unmarked) -> list[int]:
        """Return the token ids of a text that a chat template has written; see Tokenizer."""
        text, special, token_ids, at = rendered.text, self.special_tokens, [], 0
        for start, end in special.spans(text):
            if rendered.inside(start, end):
                plain = special.plain_ids[special.ids[text[start:end]]]
                token_ids += self.encode(text[at:start], add_special_tokens=False) + plain
                at = end
        return token_ids + self.encode(text[at:], add_special_tokens=False)

    def to_json(self) -> str:
        """Raise ValueError: there is no tokenizer.json to give."""
        raise ValueError("the model folder has no tokenizer.json")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that form no character become U+FFFD."""
        known = [token_id for token_id in token_ids if token_id < len(self._pieces)]
        if self._joins_pieces:
            hidden = self._special_ids if skip_special_tokens else frozenset()
            text = b"".join(self._pieces[token_id] for token_id in known if token_id not in hidden)
        else:
            decoder = self._skipping if skip_special_tokens else self._showing
            text = decoder.row(np.array([known], np.int64)).tobytes()
        return text.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; a special token stands for its name."""
        piece = self._pieces[token_id]
        return sentencepiece_bytes(piece.decode()) if self._graphs.falls_back_to_bytes else piece

    @property
    def joins_bytes(self) -> bool:
        """Whether a text is just the bytes of its tokens; see Tokenizer."""
        return self._joins_pieces

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens; see Tokenizer."""
        return self._special_ids

    def decoded_bytes(self, token_id: int) -> bytes:
        """Return what `decode` makes of a token; see Tokenizer."""
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact name in the vocabulary, None when there is none."""
        return self._ids.get(token.encode())

    @staticmethod
    def _encode(pool: _Pool, text: str) -> list[int]:
        data = np.frombuffer(text.encode(), np.uint8)
        token_ids: list[int] = pool.row(np.array([0], np.int32), np.array([data.size], np.int32), data).tolist()
        return token_ids


class _Pool:
    """One compiled graph, and as many of its requests as threads have needed at once."""

    def __init__(self, model: ov.Model) -> None:
        self._compiled = openvino_core().compile_model(model, "CPU", {"NUM_STREAMS": _STREAMS})
        self._idle: deque[ov.InferRequest] = deque()

    def row(self, *inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the one row of the result, a copy. Raises InvalidFieldError for what the graph cannot take."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            request.infer(dict(enumerate(inputs)))
            begins, ends, values = (request.get_output_tensor(at).data for at in range(3))
            row: npt.NDArray[Any] = values[begins[0] : ends[0]].copy() if begins.size else values[:0].copy()
            return row
        except RuntimeError as error:
            raise InvalidFieldError(f"the text cannot be tokenised: {str(error).strip().splitlines()[-1]}") from error
        finally:
            self._idle.append(request)
