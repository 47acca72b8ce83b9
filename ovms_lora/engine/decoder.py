"""Decoder: from the logits of a step to its outputs; who has all its tokens computed gets the next one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from ovms_lora.core.errors import EngineError, InvalidFieldError, OvmsLoraError
from ovms_lora.core.request import GenerationRequest, SequenceOutput
from ovms_lora.engine.draw import FloatArray
from ovms_lora.engine.live_requests import LiveRequests
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.sampler import Sampler
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Drafted:
    """A sequence with a draft; the logits after its own last token stand in `first_row`, then those of the draft."""

    sequence: Sequence
    draft: tuple[int, ...]
    first_row: int


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
        drafted: list[_Drafted] = []
        outputs: list[SequenceOutput] = []
        end = 0
        for chunk in chunks:
            begin, end = end, end + chunk.num_sampled
            sequence, params = chunk.sequence, chunk.sequence.request.sampling
            if params.prompt_logprobs is not None and sequence.num_output == 0:
                self._output.prompt_rows(chunk, logits[begin:end])
            if not chunk.samples:
                continue
            if params.max_tokens == 0:
                outputs += self._without_tokens(sequence)
            elif params.beam_width > 1:
                outputs += self._search(sequence, logits[end - 1])
            elif chunk.draft:
                drafted.append(_Drafted(sequence, chunk.draft, end - chunk.num_sampled))
            else:
                rows.append(end - 1)
                sampling.append(sequence)
        if sampling:
            outputs += self._sample(logits if len(rows) == len(logits) else logits[rows], sampling)
        return outputs + self._check(drafted, logits) if drafted else outputs

    def _check(self, drafted: Seq[_Drafted], logits: FloatArray) -> list[SequenceOutput]:
        """Choose the next tokens of sequences with drafts, one after another as without them.

        The row behind a token of a draft is good as long as that very token was chosen.
        """
        answers: dict[Sequence, SequenceOutput] = {}
        ahead, place = list(drafted), 0
        while ahead:
            rows = [each.first_row + place for each in ahead]
            going_on = []
            for each, output in zip(ahead, self._sample(logits[rows], [e.sequence for e in ahead]), strict=True):
                before = answers.get(each.sequence)
                answers[each.sequence] = before.then(output) if before else output
                if not output.finished and each.draft[place : place + 1] == output.token_ids:
                    going_on.append(each)
            ahead, place = going_on, place + 1
        return list(answers.values())

    def _without_tokens(self, sequence: Sequence) -> list[SequenceOutput]:
        output, sampling = self._output.without_tokens(sequence), sequence.request.sampling
        self._live.drop(sequence)
        indices = range(sampling.n) if sampling.beam_width > 1 else [sequence.index]
        return [replace(output, index=index) for index in indices]

    def _search(self, sequence: Sequence, row: FloatArray) -> list[SequenceOutput]:
        """Give a beam's logits to its search; return the answers when the search is over."""
        search = self._live.search_of(sequence)
        if search is None:
            return []  # another beam of this step has failed
        request = sequence.request
        adjusted = self._sampler.adjusted(row, sequence)
        if adjusted is None:
            return self._live.fail([request.request_id], _nothing_to_choose(sequence))
        search.offer(sequence, row, adjusted)
        if not search.ready:
            return []
        forks = search.advance()
        if forks:
            self._live.replace(request.request_id, forks)
            return []
        results = search.results
        if len(results) < request.sampling.n:
            return self._live.fail([request.request_id], _too_few_results(request))
        self._live.end(request.request_id)
        return results

    def _sample(self, logits: FloatArray, sequences: Seq[Sequence]) -> list[SequenceOutput]:
        outputs = []
        for sequence, sampled in zip(sequences, self._sampler.sample(logits, sequences), strict=True):
            if sampled is None:
                output = self._output.failed(sequence, _nothing_to_choose(sequence))
            else:
                output = self._output.token(sequence, sampled)
            outputs.append(output)
            if output.finished:
                self._live.drop(sequence)
        return outputs


def _nothing_to_choose(sequence: Sequence) -> OvmsLoraError:
    failure = sequence.matcher.failure if sequence.matcher else None
    return failure or EngineError("the model gave no finite logits")


def _too_few_results(request: GenerationRequest) -> OvmsLoraError:
    if request.constraint is None:
        return EngineError("the model gave too few finite logits")
    return InvalidFieldError(f"the constraint allows fewer than {request.sampling.n} texts", param="n")
