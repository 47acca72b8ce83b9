"""OutputProcessor: from a chosen token to what the client sees, and to whether the sequence ends."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.core.request import FinishReason, GenerationRequest, SequenceOutput, TokenLogprob
from ovms_lora.engine.detokenizer import Detokenizer, detokenizer
from ovms_lora.engine.draw import FloatArray, token_logprob
from ovms_lora.engine.sampler import Sampled
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.stop_strings import StopStrings
from ovms_lora.engine.tokenizer import Tokenizer


@dataclass(slots=True)
class _Text:
    detokenizer: Detokenizer
    stops: StopStrings
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    started: bool = False


@dataclass(frozen=True, slots=True)
class _Ending:
    reason: FinishReason | None = None
    stopped_by: str | int | None = None
    hides_token: bool = False


_GOES_ON = _Ending()


class OutputProcessor:
    """Keeps the text of every live sequence. `max_model_len` bounds prompt and output together, in tokens."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int], max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._texts: dict[Sequence, _Text] = {}

    def add(self, sequence: Sequence) -> None:
        """Start a sequence's text."""
        sampling = sequence.request.sampling
        prompt, skip = sequence.request.prompt_token_ids, sampling.skip_special_tokens
        stops = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output)
        self._texts[sequence] = _Text(detokenizer(self._tokenizer, prompt, skip_special_tokens=skip), stops)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a sequence go on from the text of another."""
        text = self._texts[parent]
        self._texts[child] = replace(text, detokenizer=text.detokenizer.fork(), stops=copy.copy(text.stops))

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._texts.pop(sequence, None)

    def prompt_rows(self, chunk: Chunk, logits: FloatArray) -> None:
        """Take the log-probabilities of a prompt chunk; row i of `logits` predicts token `chunk.start + i + 1`."""
        sequence = chunk.sequence
        top = sequence.request.sampling.prompt_logprobs
        assert top is not None, "prompt rows are computed only when they are asked for"
        collected = self._texts[sequence].prompt_logprobs
        prompt = sequence.request.prompt_token_ids
        for position, row in enumerate(logits, start=chunk.start + 1):
            # A prompt that was preempted is computed anew: what is known already is not taken twice.
            if len(collected) == position < len(prompt):
                collected.append(token_logprob(row, prompt[position], top))

    def token(self, sequence: Sequence, sampled: Sampled) -> SequenceOutput:
        """Append a chosen token to its sequence; return what the client gets."""
        sequence.token_ids.append(sampled.token_id)
        text = self._texts[sequence]
        ending = self._ending(sequence, sampled.token_id)
        sampling = sequence.request.sampling
        piece = "" if ending.hides_token else text.detokenizer.add(sampled.token_id)
        if ending.reason is not None:
            piece += text.detokenizer.flush()
        if sequence.num_output >= sampling.min_tokens:
            cut = text.stops.add(piece)
            piece = cut.text
            if cut.stopped_by is not None:
                ending = _Ending(FinishReason.STOP, cut.stopped_by)
            elif ending.reason is not None:
                piece += text.stops.flush()
        return self._output(sequence, piece, sampled, ending)

    def most_tokens(self, request: GenerationRequest) -> int:
        """Return how many tokens may follow the request's prompt."""
        room = self._max_model_len - len(request.prompt_token_ids)
        wanted = request.sampling.max_tokens
        return room if wanted is None else min(room, wanted)

    def ending_tokens(self, request: GenerationRequest) -> frozenset[int]:
        """Return the tokens that end a sequence of the request."""
        sampling = request.sampling
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos)

    def without_tokens(self, sequence: Sequence) -> SequenceOutput:
        """End a sequence that only wanted its prompt computed (`max_tokens` 0)."""
        return self._output(sequence, "", None, _Ending(FinishReason.LENGTH))

    def failed(self, sequence: Sequence, error: OvmsLoraError) -> SequenceOutput:
        """End a sequence with an error."""
        return SequenceOutput(sequence.request.request_id, sequence.index, error=error)

    def _output(self, sequence: Sequence, text: str, sampled: Sampled | None, ending: _Ending) -> SequenceOutput:
        state = self._texts[sequence]
        first, state.started = not state.started, True
        wants_prompt = first and sequence.request.sampling.prompt_logprobs is not None
        return SequenceOutput(
            sequence.request.request_id,
            sequence.index,
            text=text,
            token_ids=(sampled.token_id,) if sampled else (),
            logprobs=(sampled.logprob,) if sampled and sampled.logprob else (),
            prompt_logprobs=tuple(state.prompt_logprobs) if wants_prompt else None,
            cached_tokens=sequence.num_cached or 0,
            finish_reason=ending.reason,
            stop_reason=ending.stopped_by,
        )

    def _ending(self, sequence: Sequence, token_id: int) -> _Ending:
        sampling = sequence.request.sampling
        matcher = sequence.matcher
        if matcher is not None and matcher.finished:
            return _Ending(FinishReason.STOP, hides_token=token_id in self._eos)
        if sequence.num_output >= sampling.min_tokens:
            if token_id in self._eos and not sampling.ignore_eos:
                return _Ending(FinishReason.STOP, hides_token=True)
            if token_id in sampling.stop_token_ids:
                return _Ending(FinishReason.STOP, token_id, hides_token=not sampling.include_stop_str_in_output)
        if sampling.max_tokens is not None and sequence.num_output >= sampling.max_tokens:
            return _Ending(FinishReason.LENGTH)
        if sequence.num_tokens >= self._max_model_len:
            return _Ending(FinishReason.LENGTH)
        return _GOES_ON
