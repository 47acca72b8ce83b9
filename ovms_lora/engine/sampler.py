"""Sampler: chooses the next token of each sequence from its row of logits, and gives log-probabilities.

The order is: penalties and biases, what the constraint allows, temperature, top_k, top_p, min_p, one random number.
Log-probabilities are those of the model itself, before any of these. A row's choice depends on that row, its
sequence's own random numbers and its own matcher only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ovms_lora.core.request import TokenLogprob
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine import sequence as engine_sequence

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_LEAST_TEMPERATURE = 1e-6  # below it only the best tokens have weight, and a division could leave float32
_HIGHEST = 1e30  # for an adjusted logit, so that differences divided by the least temperature stay in float32
_LANE = 64  # a vocabulary row is looked at in lanes of this width, so that it is never sorted whole


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, and its log-probability where that was asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


class Sampler:
    """Chooses tokens for a whole step at once. `eos_token_ids` are kept out until `min_tokens` is reached."""

    def __init__(self, eos_token_ids: Collection[int] = ()) -> None:
        self._eos = frozenset(eos_token_ids)

    def sample(self, logits: FloatArray, sequences: Sequence[engine_sequence.Sequence]) -> list[Sampled | None]:
        """Return one choice per row; `logits` is [rows, vocabulary] and stays as it is.

        None stands for a row of which nothing can be chosen: it holds NaN or +inf, or every token is forbidden. The
        matcher of a constrained sequence goes on with the choice.
        """
        best = logits.argmax(axis=1)
        chosen: list[Sampled | None] = []
        for row, sequence, top in zip(logits, sequences, best.tolist(), strict=True):
            token = self._choose(row, sequence, top)
            if token is None:
                chosen.append(None)
                continue
            if sequence.matcher is not None:
                sequence.matcher.accept(token)
            wanted = sequence.request.sampling.logprobs
            chosen.append(Sampled(token, None if wanted is None else token_logprob(row, token, wanted)))
        return chosen

    def adjusted(self, row: FloatArray, sequence: engine_sequence.Sequence) -> FloatArray | None:
        """Return a row with penalties, biases and forbidden tokens applied; None where nothing of it can be chosen."""
        if not np.isfinite(row.max()):
            return None
        row = self._adjusted(row, sequence) if _adjusts(sequence) else row
        return row if np.isfinite(row.max()) else None

    def _choose(self, row: FloatArray, sequence: engine_sequence.Sequence, best: int) -> int | None:
        sampling = sequence.request.sampling
        # argmax finds NaN before anything else, so the best value tells of the whole row.
        if not np.isfinite(row[best]):
            return None
        if _adjusts(sequence):
            row = self._adjusted(row, sequence)
            best = int(row.argmax())
            if not np.isfinite(row[best]):
                return None
        return best if sampling.greedy else draw(row, sampling, sequence.rng)

    def _adjusted(self, row: FloatArray, sequence: engine_sequence.Sequence) -> FloatArray:
        """Return the row with penalties, biases and forbidden tokens applied."""
        sampling = sequence.request.sampling
        row = row.copy()
        if sampling.repetition_penalty != 1.0:
            # Keskar et al., "CTRL", 2019, section 4.1; over prompt and output, as in transformers.
            seen = np.unique(np.asarray(sequence.token_ids))
            penalty, values = sampling.repetition_penalty, row[seen].astype(np.float64)
            with np.errstate(over="ignore"):
                row[seen] = np.minimum(np.where(values > 0, values / penalty, values * penalty), _HIGHEST)
        if sampling.presence_penalty or sampling.frequency_penalty:
            # OpenAI's API reference: mu[j] -= c[j] * frequency + (c[j] > 0) * presence, over the output.
            seen, counts = np.unique(np.asarray(sequence.output_token_ids, np.int64), return_counts=True)
            row[seen] -= counts * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
        for token, bias in sampling.logit_bias.items():
            row[token] += np.float32(min(max(bias, -_HIGHEST), _HIGHEST))
        if sequence.matcher is not None:
            row[~sequence.matcher.allowed(len(row))] = -np.inf
        self._hold_back_ends(row, sequence)
        return row

    def _hold_back_ends(self, row: FloatArray, sequence: engine_sequence.Sequence) -> None:
        """Forbid the tokens that would end the sequence too early.

        A constraint that allows nothing else wins. It would take an EOS that is ignored for the end of the text.
        """
        sampling, constrained = sequence.request.sampling, sequence.matcher is not None
        if sequence.num_output < sampling.min_tokens:
            ends = [*self._eos, *sampling.stop_token_ids]
        elif constrained and sampling.ignore_eos:
            ends = [*self._eos]
        else:
            return
        before = row[ends]
        row[ends] = -np.inf
        if constrained and row.max() == -np.inf:
            row[ends] = before


def _adjusts(sequence: engine_sequence.Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sequence.num_output < sampling.min_tokens
        or sequence.matcher is not None
    )


def draw(row: FloatArray, sampling: SamplingParams, rng: np.random.Generator) -> int:
    """Draw a token id from one row of logits [vocabulary] with temperature above 0, using one random number."""
    temperature = np.float32(max(sampling.temperature, _LEAST_TEMPERATURE))
    weights = np.exp((row - row.max()) / temperature, dtype=np.float32)
    tokens = _kept(weights, sampling)
    if tokens is not None:
        weights = weights[tokens]
    heap = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(heap, rng.random() * heap[-1], side="right"))
    place = min(place, len(heap) - 1)
    return place if tokens is None else int(tokens[place])


def _kept(weights: FloatArray, sampling: SamplingParams) -> IntArray | None:
    """Return the tokens that top_k, top_p and min_p leave, best first; None when that is all of them."""
    tokens = top_indices(weights, sampling.top_k) if 0 < sampling.top_k < len(weights) else None
    if sampling.top_p < 1.0:
        tokens = _nucleus(weights, tokens, sampling.top_p)
    if sampling.min_p > 0.0:
        # The best token has weight 1, so min_p is a bound on weights as they are.
        tokens = (
            np.flatnonzero(weights >= sampling.min_p) if tokens is None else tokens[weights[tokens] >= sampling.min_p]
        )
    return tokens


def _nucleus(weights: FloatArray, tokens: IntArray | None, top_p: float) -> IntArray:
    """Return the fewest tokens, best first, that hold `top_p` of the weight (of `tokens`, or of all)."""
    if tokens is not None:
        heap = np.cumsum(weights[tokens], dtype=np.float64)
        return tokens[: int(np.searchsorted(heap, top_p * heap[-1])) + 1]
    target = top_p * float(weights.sum(dtype=np.float64))
    count = _LANE
    while True:
        best = top_indices(weights, count)
        heap = np.cumsum(weights[best], dtype=np.float64)
        if heap[-1] >= target or len(best) == len(weights):
            return best[: int(np.searchsorted(heap, target)) + 1]
        count *= 8


def top_indices(row: FloatArray, count: int) -> IntArray:
    """Return the indices of the `count` largest values, largest first, equal ones by index.

    At least `count` values reach the `count`-th largest lane maximum, so only those that do are sorted; with fewer
    lanes than that, those that reach the `count`-th largest value.
    """
    lanes = len(row) // _LANE
    if count >= len(row):
        return np.argsort(-row, kind="stable")
    peaks = row[: lanes * _LANE].reshape(lanes, _LANE).max(axis=1) if count < lanes else row
    place = len(peaks) - count
    candidates = np.flatnonzero(row >= np.partition(peaks, place)[place])
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]


def token_logprob(row: FloatArray, token_id: int, top: int) -> TokenLogprob:
    """Return the natural log-probability of a token under one row of logits, its rank, and the `top` best tokens."""
    shift = float(row.max())
    norm = shift + float(np.log(np.exp(row - np.float32(shift)).sum(dtype=np.float64)))
    best = top_indices(row, top) if top else ()
    alternatives = tuple((int(i), float(row[i]) - norm) for i in best)
    rank = 1 + int(np.count_nonzero(row > row[token_id]))
    return TokenLogprob(token_id, float(row[token_id]) - norm, alternatives, rank)
