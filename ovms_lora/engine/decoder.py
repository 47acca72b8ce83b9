"""Decoder: from the logits of a step to its outputs; who has all its tokens computed gets the next one."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ovms_lora.core.errors import EngineError
from ovms_lora.core.request import SequenceOutput
from ovms_lora.engine.live_requests import LiveRequests
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.sampler import FloatArray, Sampler
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence


class Decoder:
    """Chooses tokens, makes outputs of them, and drops the sequences that end with it."""

    def __init__(self, live: LiveRequests, sampler: Sampler, output: OutputProcessor) -> None:
        self._live = live
        self._sampler = sampler
        self._output = output

    def decode(self, chunks: Seq[Chunk], logits: FloatArray) -> list[SequenceOutput]:
        """Return what the step brings; `logits` are [rows, vocabulary], each chunk's `num_sampled` rows in order."""
        rows: list[int] = []
        sampling: list[Sequence] = []
        outputs: list[SequenceOutput] = []
        end = 0
        for chunk in chunks:
            begin, end = end, end + chunk.num_sampled
            sequence, params = chunk.sequence, chunk.sequence.request.sampling
            if params.prompt_logprobs is not None and sequence.num_output == 0:
                self._output.prompt_rows(chunk, logits[begin:end])
            if chunk.samples and params.max_tokens == 0:
                outputs.append(self._output.without_tokens(sequence))
                self._live.drop(sequence)
            elif chunk.samples:
                rows.append(end - 1)
                sampling.append(sequence)
        if sampling:
            outputs += self._sample(logits if len(rows) == len(logits) else logits[rows], sampling)
        return outputs

    def _sample(self, logits: FloatArray, sequences: Seq[Sequence]) -> list[SequenceOutput]:
        outputs = []
        for sequence, sampled in zip(sequences, self._sampler.sample(logits, sequences), strict=True):
            if sampled is None:
                output = self._output.failed(sequence, EngineError("the model gave no finite logits"))
            else:
                output = self._output.token(sequence, sampled)
            outputs.append(output)
            if output.finished:
                self._live.drop(sequence)
        return outputs
