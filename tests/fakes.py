"""A deterministic device and a byte tokenizer: scheduler, engine and server run on them without OpenVINO.

FakeRunner keeps tokens where a device keeps keys and values, block by block, and makes its logits from what it reads
back through the block tables. So a block that is lost, shared wrongly or overwritten changes the text.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ovms_lora.core.errors import EngineError
from ovms_lora.engine.block_tables import BlockCopy
from ovms_lora.engine.runner import FloatArray
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.tokenizer import Tokenizer

EOS = 256
VOCAB_SIZE = 257
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", np.uint8).astype(np.int64)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and `</s>` (id 256), which ends a sequence."""
    backend = byte_backend()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


def byte_backend() -> tokenizers.Tokenizer:
    """One token per byte."""
    alphabet = _byte_alphabet()
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(zip(alphabet, range(256), strict=True)), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0 … 255, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


class FakeRunner:
    """Writes letters and spaces; the choice depends on all tokens before, and on the request's adapters.

    `ends_after` makes EOS the best token once that many tokens stand in the context, if it is given. `gate`, while it
    is not set, keeps steps from running; `before_step` is called with the chunks of each step.
    """

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        ends_after: Callable[[list[int]], bool] | None = None,
        before_step: Callable[[Sequence[Chunk]], None] | None = None,
        copies_blocks: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.copies_blocks = copies_blocks
        self.num_copies = 0
        self.steps: list[list[tuple[str, int, int, int]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next: EngineError | None = None
        self._ends_after = ends_after
        self._before_step = before_step
        self._cache = np.full((num_blocks, block_size), -1, np.int64)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        assert self.copies_blocks or not copies
        for copy in copies:
            self._cache[copy.target] = self._cache[copy.source]
        self.num_copies += len(copies)

    def run(self, chunks: Sequence[Chunk]) -> FloatArray:
        self.gate.wait()
        self.steps.append([(c.sequence.request.request_id, c.sequence.index, c.start, c.count) for c in chunks])
        if self._before_step:
            self._before_step(chunks)
        if self.fail_next:
            error, self.fail_next = self.fail_next, None
            raise error
        rows: list[FloatArray] = []
        for chunk in chunks:
            self._write(chunk)
            end = chunk.start + chunk.count
            lengths = range(end - chunk.num_sampled + 1, end + 1)
            rows += [self._logits(self._read(chunk, length), chunk) for length in lengths]
        return np.stack(rows) if rows else np.zeros((0, VOCAB_SIZE), np.float32)

    def _write(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        for position, token in enumerate(chunk.token_ids, start=chunk.start):
            block = sequence.blocks[position // self.block_size]
            self._cache[block, position % self.block_size] = token

    def _read(self, chunk: Chunk, length: int) -> list[int]:
        table = chunk.sequence.blocks
        return [int(self._cache[table[i // self.block_size], i % self.block_size]) for i in range(length)]

    def _logits(self, context: list[int], chunk: Chunk) -> FloatArray:
        adapters = [f"{use.digest}*{use.alpha}" for use in chunk.sequence.request.adapters]
        seed = hashlib.sha256(repr((context, adapters)).encode()).digest()
        row = np.full(VOCAB_SIZE, -30.0, np.float32)
        scores = np.frombuffer(seed[: len(_LETTERS)], np.uint8).astype(np.float32) / 64
        np.maximum.at(row, _LETTERS[: len(scores)], scores)
        if self._ends_after and self._ends_after(context):
            row[EOS] = 100.0
        return row


class ScriptedRunner(FakeRunner):
    """Writes the same text for every prompt, one byte per token, and ends."""

    def __init__(self, text: str) -> None:
        super().__init__(num_blocks=1024)
        self._script = [*text.encode(), EOS]

    def _logits(self, context: list[int], chunk: Chunk) -> FloatArray:
        written = len(context) - len(chunk.sequence.request.prompt_token_ids)
        row = np.full(VOCAB_SIZE, -30.0, np.float32)
        row[self._script[min(written, len(self._script) - 1)]] = 100.0
        return row
