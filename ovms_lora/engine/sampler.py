"""Sampler: chooses the next token of each sequence from its row of logits, and gives log-probabilities.

The order is: penalties and biases, what the constraint allows, temperature, top_k, top_p, min_p, one random number.
Log-probabilities are those of the model itself, before any of these. A row's choice depends on that row, its
sequence's own random numbers and its own matcher only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ovms_lora.core.request import TokenLogprob
from ovms_lora.engine import sequence as engine_sequence
from ovms_lora.engine.draw import FloatArray, draw, token_logprob

_HIGHEST = 1e30  # for an adjusted logit, so that differences divided by the least temperature stay in float32


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
        best = [int(row.argmax()) for row in logits]  # row by row it is faster than along an axis
        # argmax finds NaN before anything else, so the best value tells of the whole row.
        sound = np.isfinite(logits[np.arange(len(best)), best]).tolist()
        chosen: list[Sampled | None] = []
        for at, (sequence, top) in enumerate(zip(sequences, best, strict=True)):
            token = self._choose(logits[at], sequence, top) if sound[at] else None
            if token is None:
                chosen.append(None)
                continue
            if sequence.matcher is not None:
                sequence.matcher.accept(token)
            wanted = sequence.request.sampling.logprobs
            chosen.append(Sampled(token, None if wanted is None else token_logprob(logits[at], token, wanted)))
        return chosen

    def adjusted(self, row: FloatArray, sequence: engine_sequence.Sequence) -> FloatArray | None:
        """Return a row with penalties, biases and forbidden tokens applied; None where nothing of it can be chosen."""
        if not np.isfinite(row.max()):
            return None
        row = self._adjusted(row, sequence) if _adjusts(sequence) else row
        return row if np.isfinite(row.max()) else None

    def _choose(self, row: FloatArray, sequence: engine_sequence.Sequence, best: int) -> int | None:
        sampling = sequence.request.sampling
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
