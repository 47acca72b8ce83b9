"""What is read off one row of logits [vocabulary]: the best tokens, a random one, log-probabilities.

No row is ever sorted whole. A row is looked at as `_DEPTH` lines under one another, since numpy goes down columns
several times faster than it goes through short lanes. One row at a time, for it and what is made of it stay in the
core's cache, which all rows of a step do not. Knows no sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ovms_lora.core.request import TokenLogprob
from ovms_lora.core.sampling_params import SamplingParams

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_LEAST_TEMPERATURE = 1e-6  # below it only the best tokens have weight, and a division could leave float32
_DEPTH = 64
_FEW = 64  # of the best tokens hold all of the weight that `top_p` asks for, mostly
_COARSE = 20  # of a float32's bits are left out where weights are told apart by size first


def draw(row: FloatArray, sampling: SamplingParams, rng: np.random.Generator) -> int:
    """Draw a token id from one row with temperature above 0, using one random number."""
    temperature = np.float32(max(sampling.temperature, _LEAST_TEMPERATURE))
    if 0 < sampling.top_k < len(row):
        tokens = top_indices(row, sampling.top_k)
        weights = _weights(row[tokens], row[tokens[0]], temperature)
        if sampling.top_p < 1.0:
            count = _reaching(weights, sampling.top_p * float(weights.sum(dtype=np.float64)))
            tokens, weights = tokens[:count], weights[:count]
    else:
        weights = _weights(row, row.max(), temperature)
        if sampling.top_p == 1.0 and sampling.min_p == 0.0:
            return _place(weights, rng.random())
        tokens = nucleus(weights, sampling.top_p) if sampling.top_p < 1.0 else np.flatnonzero(weights >= sampling.min_p)
        weights = weights[tokens]
    if sampling.min_p > 0.0:
        # The best token has weight 1, so min_p is a bound on weights as they are.
        kept = weights >= sampling.min_p
        tokens, weights = tokens[kept], weights[kept]
    return int(tokens[_place(weights, rng.random())])


def top_indices(row: FloatArray, count: int) -> IntArray:
    """Return the indices of the `count` largest values, largest first, equal ones by index.

    At least `count` values reach the `count`-th largest column maximum, and they stand in columns that do.
    """
    columns = len(row) // _DEPTH
    if count >= columns:
        candidates = np.arange(len(row)) if count >= len(row) else _at_least(row, len(row) - count)
    else:
        lines = row[: columns * _DEPTH].reshape(_DEPTH, columns)
        peaks = lines.max(axis=0)
        bound = np.partition(peaks, columns - count)[columns - count]
        reaching = np.flatnonzero(peaks >= bound)
        line, column = np.nonzero(lines[:, reaching] >= bound)
        rest = np.flatnonzero(row[columns * _DEPTH :] >= bound) + columns * _DEPTH
        candidates = np.sort(np.concatenate((line * columns + reaching[column], rest)))
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]


def nucleus(weights: FloatArray, top_p: float) -> IntArray:
    """Return the fewest tokens that hold `top_p` of the weight: none left out weighs more than one of them.

    Where a few do not hold it, weights are counted by their size first, so that only those are sorted that are as large
    as the last one taken.
    """
    target = top_p * _total(weights)
    best = top_indices(weights, _FEW)
    held = np.cumsum(weights[best], dtype=np.float64)
    if held[-1] >= target:
        return best[: int(np.searchsorted(held, target)) + 1]
    sizes = weights.view(np.int32) >> _COARSE  # of floats that are not negative, larger ones have larger bits
    sums = np.cumsum(np.bincount(sizes, weights)[::-1])
    last = len(sums) - 1 - min(int(np.searchsorted(sums, target)), len(sums) - 1)
    above, there = np.flatnonzero(sizes > last), np.flatnonzero(sizes == last)
    there = there[np.argsort(-weights[there], kind="stable")]
    left = target - float(weights[above].sum(dtype=np.float64))
    return np.concatenate((above, there[: _reaching(weights[there], left)]))


def token_logprob(row: FloatArray, token_id: int, top: int) -> TokenLogprob:
    """Return the natural log-probability of a token under one row of logits, its rank, and the `top` best tokens."""
    peak, value = row.max(), row[token_id]
    norm = float(peak) + float(np.log(_total(_weights(row, peak, np.float32(1)))))
    best = top_indices(row, top) if top else ()
    alternatives = tuple((int(i), float(row[i]) - norm) for i in best)
    rank = 1 if value == peak else 1 + int(np.count_nonzero(row > value))
    return TokenLogprob(token_id, float(value) - norm, alternatives, rank)


def _weights(row: FloatArray, peak: np.float32, temperature: np.float32) -> FloatArray:
    """Return exp((row - peak) / temperature)."""
    weights = row - peak
    if temperature != 1:
        weights /= temperature
    np.exp(weights, out=weights)
    return weights


def _total(weights: FloatArray) -> float:
    """Return the sum, short sums in float32 and those in float64."""
    columns = len(weights) // _DEPTH
    short = weights[: columns * _DEPTH].reshape(_DEPTH, columns).sum(axis=0)
    return float(short.sum(dtype=np.float64)) + float(weights[columns * _DEPTH :].sum(dtype=np.float64))


def _place(weights: FloatArray, share: float) -> int:
    """Return the place at which a running sum, column after column, passes this share (0 ≤ share < 1) of the whole."""
    columns = len(weights) // _DEPTH
    if columns < _DEPTH:
        return _passing(weights, share)[0]
    lines, rest = weights[: columns * _DEPTH].reshape(_DEPTH, columns), weights[columns * _DEPTH :]
    column, left = _passing(np.append(lines.sum(axis=0), rest.sum()), share)
    if column == columns:
        return columns * _DEPTH + _passing(rest, left)[0]
    return _passing(lines[:, column], left)[0] * columns + column


def _passing(weights: FloatArray, share: float) -> tuple[int, float]:
    """Return where the running sum passes this share of the whole, and which share of that weight it passes at."""
    heap = np.cumsum(weights, dtype=np.float64)
    goal = share * heap[-1]
    place = int(np.searchsorted(heap, goal, side="right"))
    if place == len(heap):  # the share was rounded up to the whole
        place = int(np.flatnonzero(weights)[-1])
    before = heap[place - 1] if place else 0.0
    return place, float((goal - before) / weights[place])


def _reaching(weights: FloatArray, target: float) -> int:
    """Return how many of the first weights it takes to hold `target`."""
    return int(np.searchsorted(np.cumsum(weights, dtype=np.float64), target)) + 1


def _at_least(row: FloatArray, place: int) -> IntArray:
    return np.flatnonzero(row >= np.partition(row, place)[place])
