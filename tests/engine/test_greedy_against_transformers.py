"""transformers' generate is the oracle of greedy decoding: penalties, minimal lengths, tokens that end a sequence."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from tests.engine.lora_models import Base, Bases, Served, prompt, serving

PROMPTS = [prompt(length, seed) for length, seed in ((1, 0), (9, 1), (40, 2))]
ENDING = tuple(range(7, 280, 13))
NAMES = map(str, itertools.count())

# Our fields, and transformers' names for them.
RULES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    ({"min_tokens": 7}, {"min_new_tokens": 7}),
    ({"min_tokens": 4, "repetition_penalty": 2.0}, {"min_new_tokens": 4, "repetition_penalty": 2.0}),
    ({"logit_bias": {50: 3.0, 60: -4.0}}, {"sequence_bias": {(50,): 3.0, (60,): -4.0}}),
]


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    return bases.get("llama")


@pytest.fixture(scope="module")
def served(llama: Base) -> Iterator[Served]:
    with serving(llama.folder) as model:
        yield model


@pytest.mark.parametrize(("ours", "theirs"), RULES)
@pytest.mark.parametrize("ending", [(), ENDING])
def test_the_tokens_are_those_of_transformers(
    served: Served, llama: Base, ours: dict[str, Any], theirs: dict[str, Any], ending: tuple[int, ...]
) -> None:
    import torch

    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=ending, **ours)
    requests = [GenerationRequest(next(NAMES), token_ids, sampling) for token_ids in PROMPTS]
    for request in requests:
        served.model.engine.submit(request)
    for request, answer in zip(requests, served.wait(*requests), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = llama.torch.generate(
                torch.tensor([request.prompt_token_ids]),
                attention_mask=torch.ones(1, len(request.prompt_token_ids), dtype=torch.long),
                max_new_tokens=20,
                eos_token_id=list(ending) or None,
                pad_token_id=0,
                do_sample=False,
                **theirs,
            )
        assert answer.token_ids == found[0][len(request.prompt_token_ids) :].tolist()
