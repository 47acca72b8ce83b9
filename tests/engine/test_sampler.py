"""The sampler against plain formulas in float64: which tokens, how often, and with what log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.draw import FloatArray, draw, nucleus, token_logprob, top_indices
from ovms_lora.engine.sampler import Sampled, Sampler
from ovms_lora.engine.sequence import Sequence

Float64Array = npt.NDArray[np.float64]


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, index: int = 0, **kw: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, **kw})
    result = Sequence(GenerationRequest("r", tuple(prompt or [0]), params), index)
    result.token_ids += output or []
    return result


def chosen(row: FloatArray, each: Sequence, eos: tuple[int, ...] = ()) -> Sampled:
    (sampled,) = Sampler(eos).sample(row[None], [each])
    assert sampled is not None
    return sampled


def logits(size: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=size, scale=3).astype(np.float32)


# The best of a vocabulary.


@st.composite
def rows(draw_from: st.DrawFn) -> FloatArray:
    """Rows of any length, with ties and with forbidden tokens."""
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    size = draw_from(st.integers(1, 700) | st.sampled_from([64, 128, 4095, 4096, 4097, 10000]))
    row = rng.normal(size=size).astype(np.float32)
    if draw_from(st.booleans()):
        row = np.round(row * draw_from(st.sampled_from([1, 4])))
    row[rng.random(size) < draw_from(st.sampled_from([0.0, 0.5, 0.99, 1.0]))] = -np.inf
    return row


@given(row=rows(), share=st.floats(0, 1), count=st.sampled_from([1, 2, 20, 40, 64]) | st.none())
@settings(max_examples=200)
def test_top_indices_are_those_of_a_full_sort(row: FloatArray, share: float, count: int | None) -> None:
    count = min(len(row), count or 1 + int(share * (len(row) - 1)))
    assert top_indices(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()


def test_asking_for_more_than_there_are_gives_all() -> None:
    assert top_indices(np.array([1, 3, 2], np.float32), 20).tolist() == [1, 2, 0]


# How often each token is drawn.


def exact(row: FloatArray, params: SamplingParams) -> Float64Array:
    """Return the probabilities that temperature, top_k, top_p and min_p leave, in this order."""
    scaled = row.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    if 0 < params.top_k < len(row):
        order = order[: params.top_k]
    heap = np.cumsum(weights[order]) / weights[order].sum()
    order = order[: int(np.searchsorted(heap, params.top_p)) + 1] if params.top_p < 1 else order
    order = order[weights[order] >= params.min_p]
    result = np.zeros(len(row))
    result[order] = weights[order] / weights[order].sum()
    return result


def fits(counts: npt.NDArray[np.int64], probabilities: Float64Array) -> bool:
    """Pearson's chi-square test at about 1 in 10,000 (Wilson and Hilferty, 1931), rare tokens taken together."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    freedom = max(len(wanted) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - wanted) ** 2 / wanted).sum()) <= limit


COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_k": -1},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 20, "min_p": 0.2},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_tokens_are_drawn_as_often_as_they_should(combination: dict[str, Any]) -> None:
    row, params = logits(100), SamplingParams(**combination)
    rng = np.random.default_rng(11)
    counts = np.bincount([draw(row, params, rng) for _ in range(8000)], minlength=100)
    probabilities = exact(row, params)
    assert not counts[probabilities == 0].any()
    assert fits(counts, probabilities)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_over_a_large_vocabulary_only_kept_tokens_are_drawn(combination: dict[str, Any]) -> None:
    row, params = logits(20011, seed=3), SamplingParams(**combination)
    rng = np.random.default_rng(5)
    probabilities = exact(row, params)
    assert all(probabilities[draw(row, params, rng)] > 0 for _ in range(200))


@given(row=rows(), top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12]), scale=st.sampled_from([0.01, 1, 20]))
@settings(max_examples=200)
def test_a_nucleus_is_the_fewest_best_tokens_that_hold_its_weight(row: FloatArray, top_p: float, scale: float) -> None:
    if not np.isfinite(row.max()):
        return
    weights = np.exp(scale * (row - row.max())).astype(np.float32)
    tokens = nucleus(weights, top_p)
    whole, held = weights.sum(dtype=np.float64), weights[tokens].sum(dtype=np.float64)
    left_out = np.delete(weights, tokens)
    assert len(np.unique(tokens)) == len(tokens)
    assert left_out.max(initial=0) <= weights[tokens].min()
    assert held >= whole * top_p * (1 - 1e-6)
    assert held - weights[tokens].min() <= whole * top_p * (1 + 1e-6)


@pytest.mark.parametrize("size", [4095, 4096, 20011])
def test_over_a_large_vocabulary_tokens_are_drawn_as_often_as_they_should(size: int) -> None:
    row, params = logits(size, seed=4), SamplingParams(top_p=0.97)
    rng = np.random.default_rng(6)
    for chosen in (params, SamplingParams()):
        counts = np.bincount([draw(row, chosen, rng) for _ in range(8000)], minlength=size)
        # In 50 groups of neighbours, and in 50 of every 50th.
        groups = np.arange(size) * 50 // size
        for group in (groups, np.arange(size) % 50):
            assert fits(
                np.bincount(group, counts).astype(np.int64), np.bincount(group, exact(row, chosen)).astype(np.float64)
            )


def test_a_flat_row_needs_more_than_one_look_for_its_nucleus() -> None:
    row, params = np.zeros(9000, np.float32), SamplingParams(top_p=0.5)
    rng = np.random.default_rng(5)
    drawn = [draw(row, params, rng) for _ in range(2000)]
    assert max(drawn) < 4500
    assert np.mean(drawn) == pytest.approx(2250, rel=0.05)


@pytest.mark.parametrize("temperature", [1e-300, 1e-50, 1e-39, 1e-10, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = logits(5000)
    assert draw(row, SamplingParams(temperature=temperature), np.random.default_rng(0)) == row.argmax()


def test_a_forbidden_token_is_never_drawn() -> None:
    row = np.full(300, -np.inf, np.float32)
    row[[7, 299]] = 0.0
    rng = np.random.default_rng(1)
    assert {draw(row, SamplingParams(temperature=5.0), rng) for _ in range(50)} == {7, 299}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_each_draw_takes_one_random_number(combination: dict[str, Any]) -> None:
    used, counted = np.random.default_rng(9), np.random.default_rng(9)
    for _ in range(3):
        draw(logits(100), SamplingParams(**combination), used)
        counted.random()
    assert used.random() == counted.random()


# Penalties, biases and tokens that are kept out.


@pytest.mark.parametrize("repetition", [1.0, 1.5, 0.5])
@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.7), (-2.0, 2.0)])
def test_penalties_follow_their_formulas(repetition: float, presence: float, frequency: float) -> None:
    row, prompt, output = logits(50), [1, 2, 2, 3], [3, 4, 4, 4, 49]
    each = sequence(
        prompt,
        output,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={0: 0.25},
    )
    expected = row.astype(np.float64)
    for token in range(50):
        if token in prompt + output:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        expected[token] -= output.count(token) * frequency + (token in output) * presence
    expected[0] += 0.25
    np.testing.assert_allclose(Sampler()._adjusted(row, each), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-30, 1e30, 1e300, 1.7e308])
@pytest.mark.parametrize("bias", [0.0, 1e300, -1e300])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
def test_extreme_penalties_and_biases_overflow_nothing(penalty: float, bias: float, temperature: float) -> None:
    each = sequence([1, 2, 3], repetition_penalty=penalty, logit_bias={3: bias}, temperature=temperature, seed=1)
    row = np.array([0.0, 30.0, -30.0, 5.0], np.float32)
    assert chosen(row, each).token_id in range(4)


def test_a_penalty_changes_a_greedy_choice() -> None:
    row = np.array([3.0, 2.9, 0.0], np.float32)
    assert chosen(row, sequence(output=[0])).token_id == 0
    assert chosen(row, sequence(prompt=[2], output=[0], presence_penalty=1.0)).token_id == 1
    assert chosen(row, sequence(prompt=[0], repetition_penalty=1.2)).token_id == 1
    assert chosen(row, sequence(logit_bias={2: 9.0})).token_id == 2


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    row = np.array([3.0, 2.9], np.float32)
    assert chosen(row, sequence(prompt=[0, 0], presence_penalty=2.0, frequency_penalty=2.0)).token_id == 0


def test_eos_and_stop_tokens_are_kept_out_until_min_tokens() -> None:
    row = np.array([5.0, 4.0, 3.0], np.float32)
    early = sequence(min_tokens=2, stop_token_ids=[1], output=[2])
    late = sequence(min_tokens=2, stop_token_ids=[1], output=[2, 2])
    assert chosen(row, early, eos=(0,)).token_id == 2
    assert chosen(row, late, eos=(0,)).token_id == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kw", [{}, {"temperature": 1.0, "top_k": 3}, {"presence_penalty": 1.0}])
def test_nothing_is_chosen_from_a_row_that_is_not_finite(value: float, kw: dict[str, Any]) -> None:
    row = logits(5000)
    row[4000] = value
    assert Sampler().sample(np.stack([row, logits(5000)]), [sequence(**kw), sequence()])[0] is None


# Log-probabilities.


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logprobs_are_the_log_softmax_of_the_row(scale: float) -> None:
    row = logits(49152) * np.float32(scale)
    wide = row.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    found = token_logprob(row, 123, 20)
    assert found.logprob == pytest.approx(expected[123], abs=2e-5)
    assert [token for token, _ in found.top] == np.argsort(-wide, kind="stable")[:20].tolist()
    assert [value for _, value in found.top] == pytest.approx(np.sort(expected)[::-1][:20].tolist(), abs=2e-5)


def test_the_rank_counts_the_tokens_that_are_more_probable() -> None:
    row = logits(300)
    order = np.argsort(-row, kind="stable")
    assert [token_logprob(row, int(order[place]), 2).rank for place in (0, 1, 7, 299)] == [1, 2, 8, 300]


def test_logprobs_are_those_before_penalties_and_temperature() -> None:
    row = logits(300)
    found = chosen(row, sequence(temperature=0.1, seed=1, presence_penalty=2.0, output=[5], logprobs=4))
    assert found.logprob == token_logprob(row, found.token_id, 4)


def test_logprobs_of_zero_give_the_token_alone() -> None:
    found = chosen(logits(300), sequence(logprobs=0)).logprob
    assert found is not None
    assert found.top == ()


# Rows of a batch.


def batch() -> list[Sequence]:
    return [
        sequence(),
        sequence(output=[3, 3], presence_penalty=1.0, frequency_penalty=0.5),
        sequence(temperature=1.0, seed=1),
        sequence(temperature=1.0, seed=1, index=1),
        sequence(temperature=0.7, seed=2, top_k=40, top_p=0.9),
        sequence(temperature=1.5, seed=3, min_p=0.02, repetition_penalty=1.3, output=[9]),
        sequence(min_tokens=1, stop_token_ids=[2], logprobs=2),
    ]


@pytest.mark.parametrize("order", [range(7), range(6, -1, -1), [3, 0, 5, 1, 6, 2, 4]])
def test_the_choice_of_a_row_does_not_depend_on_other_rows(order: list[int]) -> None:
    table = np.stack([logits(5000, seed=number) for number in range(7)])
    apart = [chosen(table[at], each) for at, each in enumerate(batch())]
    together = batch()
    mixed = Sampler().sample(table[list(order)], [together[at] for at in order])
    assert mixed == [apart[at] for at in order]


def test_the_logits_stay_as_they_are() -> None:
    table = np.stack([logits(5000, seed=number) for number in range(7)])
    table.setflags(write=False)
    before = table.copy()
    Sampler((1,)).sample(table, batch())
    np.testing.assert_array_equal(table, before)


def test_sequences_of_one_seed_draw_different_numbers_and_the_same_ones_again() -> None:
    numbers = [[sequence(seed=5, temperature=1.0, index=index).rng.random() for _ in range(2)] for index in range(3)]
    assert all(first == second for first, second in numbers)
    assert len({first for first, _ in numbers}) == 3
