"""BeamSearch: instead of one sampled token per sequence, the best `beam_width` continuations of one prompt.

    beams ──offer──► candidates of each ──advance──► the best that end: results
      ▲                                      └─────► the best that go on ──┐
      └────────────────────────── forks ───────────────────────────────────┘

The rules are those of transformers' `generate(num_beams, num_beam_groups=1, do_sample=False)`, which are also OpenVINO
GenAI's: a score is the sum of log-probabilities; that of a result is divided by length ** length_penalty, its last
token counted; a result must be among the best `beam_width` of its step. Penalties, biases and what a constraint allows
change the logits before log-probabilities are taken, as in GenAI; temperature, top_k, top_p and min_p have no meaning.

Knows scores and texts; that beams are sequences with blocks is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ovms_lora.core.request import GenerationRequest, SequenceOutput, TokenLogprob
from ovms_lora.engine import sequence as engine_sequence
from ovms_lora.engine.draw import FloatArray, IntArray, token_logprob, top_indices
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.sampler import Sampled
from ovms_lora.engine.sequence import Fork

_LARGEST_DIVISOR = 1e300  # so that no length_penalty makes a score infinite


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    """A sequence, the sum of its log-probabilities, and all that it has brought so far."""

    sequence: engine_sequence.Sequence
    score: float
    answer: SequenceOutput


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """The best tokens after one beam, best first, with their scores; `logprobs` for the client, where it wants them."""

    beam: _Beam
    tokens: IntArray
    scores: npt.NDArray[np.float64]
    logprobs: Sequence[TokenLogprob] | None

    def sampled(self, place: int) -> Sampled:
        return Sampled(int(self.tokens[place]), self.logprobs[place] if self.logprobs else None)


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    score: float
    answer: SequenceOutput


class BeamSearch:
    """The search of one request, which begins with the sequence `root`. `output` has the text of every beam."""

    def __init__(self, root: engine_sequence.Sequence, output: OutputProcessor) -> None:
        request = root.request
        self._request: GenerationRequest = request
        self._output = output
        self._width = request.sampling.beam_width
        self._compared = 2 * self._width  # so many that enough go on, also where a stop string ends some
        self._ending = np.array(sorted(output.ending_tokens(request)), np.int64)
        self._beams = [_Beam(root, 0.0, SequenceOutput(request.request_id, root.index))]
        self._candidates: dict[engine_sequence.Sequence, _Candidates] = {}
        self._results: list[_Result] = []  # best first

    @property
    def ready(self) -> bool:
        """Whether the logits of every beam are known."""
        return len(self._candidates) == len(self._beams)

    @property
    def results(self) -> list[SequenceOutput]:
        """The best `n` answers, best first; fewer when the model allows no more."""
        found = self._results[: self._request.sampling.n]
        return [replace(result.answer, index=index) for index, result in enumerate(found)]

    def offer(self, sequence: engine_sequence.Sequence, logits: FloatArray, adjusted: FloatArray) -> None:
        """Take a beam's row of logits [vocabulary], as the model gave it and after penalties and biases.

        The sequence is parked until `advance`. Rows are not kept.
        """
        beam = next(beam for beam in self._beams if beam.sequence is sequence)
        tokens = self._best(adjusted)
        scores = beam.score + _log_probabilities(adjusted, tokens)
        top = self._request.sampling.logprobs
        logprobs = None if top is None else _for_client(logits, tokens, top)
        self._candidates[sequence] = _Candidates(beam, tokens, scores, logprobs)
        sequence.parked = True

    def advance(self) -> list[Fork]:
        """Choose the next beams; return how they come out of the present ones, nothing when the search is over."""
        assert self.ready, "a beam is compared with all others"
        beams: list[_Beam] = []
        forks: list[Fork] = []
        for place, (candidates, at) in enumerate(self._ranked()):
            beam = self._extended(candidates, at)
            if not beam.answer.finished:
                beams.append(beam)
                forks.append(Fork(candidates.beam.sequence, beam.sequence))
            elif place < self._width:
                self._keep_result(beam)
            if len(beams) == self._width:
                break
        self._beams = beams
        self._candidates = {}
        if self._is_over():
            for beam in beams:
                self._output.drop(beam.sequence)
            return []
        return forks

    def _best(self, row: FloatArray) -> IntArray:
        """Return the best tokens of a row, best first: enough of all, and enough of those that go on."""
        tokens = top_indices(row, self._compared)
        if np.isin(tokens, self._ending).any():
            going_on = row.copy()
            going_on[self._ending] = -np.inf
            tokens = np.union1d(tokens, top_indices(going_on, self._compared))
            tokens = tokens[np.argsort(-row[tokens], kind="stable")]
        return tokens[np.isfinite(row[tokens])]

    def _ranked(self) -> Iterator[tuple[_Candidates, int]]:
        """Yield the best candidates of all beams, best first, and of equal ones that of the better beam.

        After the first `beam_width` of them an ending token is of no use.
        """
        offered = [self._candidates[beam.sequence] for beam in self._beams]
        scores = np.concatenate([candidates.scores for candidates in offered])
        owners = np.repeat(np.arange(len(offered)), [len(candidates.tokens) for candidates in offered])
        places = np.concatenate([np.arange(len(candidates.tokens)) for candidates in offered])
        order = np.argsort(-scores, kind="stable")
        ends = np.isin(np.concatenate([candidates.tokens for candidates in offered])[order], self._ending)
        for best in order[(np.arange(len(order)) < self._width) | ~ends][: self._compared]:
            yield offered[owners[best]], int(places[best])

    def _extended(self, candidates: _Candidates, place: int) -> _Beam:
        """Return the beam that has the candidate's token; its text is kept as long as it goes on."""
        parent = candidates.beam
        child = parent.sequence.fork()
        self._output.fork(parent.sequence, child)
        sampled = candidates.sampled(place)
        if child.matcher is not None:
            child.matcher.accept(sampled.token_id)
        brought = self._output.token(child, sampled)
        if brought.finished:
            self._output.drop(child)
        return _Beam(child, float(candidates.scores[place]), parent.answer.then(brought))

    def _keep_result(self, beam: _Beam) -> None:
        self._results.append(_Result(self._normalised(beam), beam.answer))
        self._results.sort(key=lambda result: -result.score)
        del self._results[self._width :]

    def _is_over(self) -> bool:
        """Whether nothing goes on, or nothing that does is expected to be better than the results there are."""
        if not self._beams:
            return True
        if len(self._results) < self._width:
            return False
        sampling, best = self._request.sampling, self._beams[0]
        if sampling.early_stopping is True:
            return True
        # "never" asks what the best beam could still become; else its score so far decides.
        longest = sampling.early_stopping == "never" and sampling.length_penalty > 0
        length = self._output.most_tokens(self._request) if longest else best.sequence.num_output
        return self._normalised(best, length) <= self._results[-1].score

    def _normalised(self, beam: _Beam, length: int | None = None) -> float:
        tokens = float(beam.sequence.num_output if length is None else length)
        with np.errstate(over="ignore", under="ignore"):
            divisor = np.power(tokens, self._request.sampling.length_penalty)
        return beam.score / float(np.clip(divisor, 1 / _LARGEST_DIVISOR, _LARGEST_DIVISOR))


def _log_probabilities(row: FloatArray, tokens: IntArray) -> npt.NDArray[np.float64]:
    """Return the log-probabilities of tokens, the most probable of which stands first."""
    best: npt.NDArray[np.float64] = row[tokens].astype(np.float64)
    return best - best[:1] + token_logprob(row, int(tokens[0]), 0).logprob if len(tokens) else best


def _for_client(row: FloatArray, tokens: IntArray, top: int) -> list[TokenLogprob]:
    """Return log-probabilities of the model itself, whatever penalties have changed."""
    if not len(tokens):
        return []
    first = token_logprob(row, int(tokens[0]), top)
    return [TokenLogprob(int(t), first.logprob + float(row[t]) - float(row[tokens[0]]), first.top) for t in tokens]
