"""transformers' generate is the oracle of beam search: the same tokens for all prompts, widths, penalties, endings."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.request import AdapterUse, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.block_tables import BlockCopy
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.runner import OpenVinoRunner
from tests.engine.harness import Answer
from tests.engine.lora_models import LINEARS, Ask, Base, Bases, Served, drift, log_probabilities, prompt, serving

MAX_TOKENS = 14
PROMPTS = [prompt(length, seed) for length, seed in ((1, 0), (7, 1), (32, 2), (45, 3))]
ENDING = (7, 20, 33, 46, 59, 72, 85, 98, 111, 124, 137)  # enough tokens that beams end early and late
NAMES = map(str, itertools.count())

NEEDS_BF16 = pytest.mark.skipif(
    "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="the processor has no instructions for bf16, and OpenVINO then no such cache",
)


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    return bases.get("llama")


@pytest.fixture(scope="module")
def served(llama: Base) -> Iterator[Served]:
    with serving(llama.folder) as model:
        yield model


def search(token_ids: Sequence[int], *, adapters: tuple[AdapterUse, ...] = (), **sampling: Any) -> GenerationRequest:
    """Return a request for all results of a beam search."""
    width = sampling["beam_width"]
    defaults = {"n": width, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stop_token_ids": ENDING}
    return GenerationRequest(next(NAMES), tuple(token_ids), SamplingParams(**{**defaults, **sampling}), adapters)


def results(served: Served, *requests: GenerationRequest) -> list[list[list[int]]]:
    """Return the tokens of all results of each request; they arrive together."""
    return [[answer.token_ids for answer in answers] for answers in answers_of(served, *requests)]


def answers_of(served: Served, *requests: GenerationRequest) -> list[list[Answer]]:
    engine = served.model.engine

    def submit_all() -> None:
        for request in requests:
            engine.submit(request)

    engine.call(submit_all)
    served.wait(*requests)
    return [
        [served.answers.of(request.request_id, index) for index in range(request.sampling.n)] for request in requests
    ]


def expected(model: Any, request: GenerationRequest) -> list[list[int]]:
    """Return what transformers gives."""
    import torch

    sampling = request.sampling
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.eval().generate(
            torch.tensor([request.prompt_token_ids]),
            attention_mask=torch.ones(1, len(request.prompt_token_ids), dtype=torch.long),
            num_beams=sampling.beam_width,
            num_return_sequences=sampling.n,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=0,
            do_sample=False,
        )
    return [without_padding(row[len(request.prompt_token_ids) :].tolist(), sampling.stop_token_ids) for row in found]


def without_padding(tokens: list[int], ending: Sequence[int]) -> list[int]:
    ends = [at + 1 for at, token in enumerate(tokens) if token in ending]
    return tokens[: ends[0]] if ends else tokens


@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_the_tokens_are_those_of_transformers(
    served: Served, llama: Base, width: int, penalty: float, early: Any
) -> None:
    requests = [search(each, beam_width=width, length_penalty=penalty, early_stopping=early) for each in PROMPTS]
    for request, found in zip(requests, results(served, *requests), strict=True):
        assert found == expected(llama.torch, request)


@pytest.mark.parametrize("width", [3, 8, 19])
def test_a_width_gives_as_many_results_of_different_lengths(served: Served, llama: Base, width: int) -> None:
    request = search(PROMPTS[1], beam_width=width)
    (found,) = results(served, request)
    assert found == expected(llama.torch, request)
    assert len({tuple(tokens) for tokens in found}) == width
    assert len({len(tokens) for tokens in found}) > 1


@pytest.mark.parametrize("max_tokens", [1, 2, 31])
def test_the_tokens_are_bounded_as_in_transformers(served: Served, llama: Base, max_tokens: int) -> None:
    request = search(PROMPTS[2], beam_width=4, max_tokens=max_tokens, stop_token_ids=ENDING[:2])
    assert results(served, request) == [expected(llama.torch, request)]


def test_fewer_results_are_the_best_ones(served: Served) -> None:
    few, all_of_them = (search(PROMPTS[1], beam_width=5, n=n) for n in (2, 5))
    found = results(served, few, all_of_them)
    assert found[0] == found[1][:2]


@pytest.mark.parametrize(
    ("num_blocks", "engine", "preempts"),
    [
        (64, {}, False),
        (8, {}, True),  # so few that beams of one search give way to each other
        (5, {"enable_prefix_caching": False}, True),
        (128, {"max_num_batched_tokens": 5}, False),
        (128, {"max_num_seqs": 2}, True),
        (128, {"max_num_seqs": 1, "enable_prefix_caching": False}, True),
        (128, {"max_num_batched_tokens": 64, "dynamic_split_fuse": False}, False),
    ],
)
def test_neither_room_nor_chunks_change_the_tokens(
    llama: Base, num_blocks: int, engine: dict[str, Any], preempts: bool
) -> None:
    requests = [search(each, beam_width=4, max_tokens=24, stop_token_ids=ENDING[:3]) for each in PROMPTS]
    with serving(llama.folder, num_blocks=num_blocks, engine=engine) as model:
        found = results(model, *requests)
        assert (model.model.engine.stats().preemptions > 0) == preempts
        assert model.model.engine.stats().kv_cache_usage == 0
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == expected(llama.torch, request)


def test_adapters_and_blends_search_beside_the_base(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    one = llama.adapter(folder / "one", target_modules=list(LINEARS), seed=5)
    two = llama.adapter(folder / "two", target_modules=["q_proj", "lm_head"], r=7, seed=6)
    with serving(llama.folder, {"one": one, "two": two}, num_blocks=24) as model:
        of_one, blend = model.lora.select("one"), model.lora.blend([("one", 0.6), ("two", -0.8)])
        requests = [search(PROMPTS[2], beam_width=4, adapters=uses) for uses in ((), of_one, blend)]
        found = results(model, *requests)
    oracles = [llama.torch, llama.with_peft((one, 1.0)), llama.with_peft((one, 0.6), (two, -0.8))]
    assert found == [expected(oracle, request) for oracle, request in zip(oracles, requests, strict=True)]
    assert len({str(tokens) for tokens in found}) == 3


def test_greedy_requests_beside_a_search_give_the_tokens_they_give_alone(served: Served, llama: Base) -> None:
    greedy = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True) for _ in PROMPTS]
    requests = [GenerationRequest(next(NAMES), *each) for each in zip(PROMPTS, greedy, strict=True)]
    searches = [search(each, beam_width=6, max_tokens=20) for each in PROMPTS]
    together = results(served, *requests[:2], *searches, *requests[2:])
    alone = [results(served, replace(each, request_id=next(NAMES)))[0] for each in requests]
    assert [*together[:2], *together[-2:]] == alone
    assert together[2:-2] == [expected(llama.torch, request) for request in searches]


def test_logprobs_are_those_of_the_model_along_each_result(served: Served, llama: Base) -> None:
    token_ids = PROMPTS[1]
    (answers,) = answers_of(served, search(token_ids, beam_width=4, logprobs=3, prompt_logprobs=2))
    for answer in answers:
        rows = log_probabilities(llama.torch, [*token_ids, *answer.token_ids])
        assert drift(answer, token_ids, rows) < 0.01
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("f32", 1e-3), pytest.param("bf16", 0.3, marks=NEEDS_BF16), ("u8", 0.1)]
)
def test_results_have_the_logprobs_that_their_tokens_have_as_a_prompt(
    llama: Base, precision: str, tolerance: float
) -> None:
    plugin = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "KV_CACHE_PRECISION": precision,
    }
    token_ids = PROMPTS[3]
    with serving(llama.folder, plugin_config=plugin) as model:
        (answers,) = answers_of(model, search(token_ids, beam_width=6, max_tokens=24, logprobs=0, stop_token_ids=()))
        for answer in answers:
            scored = Ask((*token_ids, *answer.token_ids), max_tokens=1, prompt_logprobs=0)
            (of_prompt,) = model.together(scored)[0].prompt_logprobs
            again = [entry.logprob for entry in of_prompt[len(token_ids) :] if entry]
            assert [entry.logprob for entry in answer.logprobs] == pytest.approx(again, abs=tolerance)


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=NEEDS_BF16), "u8", "u4"])
def test_a_block_of_any_cache_precision_is_copied_whole(llama: Base, precision: str) -> None:
    options = EngineOptions(
        plugin_config={
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "KV_CACHE_PRECISION": precision,
        },
        max_num_seqs=1,
    )
    runner = OpenVinoRunner(GraphSource(llama.folder, options).compile(), options, max_model_len=256)
    caches = [tensor.data.reshape(runner.num_blocks, -1).view(np.uint8) for tensor in runner._cache.values()]
    for cache in caches:
        cache[...] = np.random.default_rng(1).integers(0, 256, cache.shape)
    before = [cache.copy() for cache in caches]
    runner.copy_blocks([BlockCopy(1, 4), BlockCopy(4, 2)])
    for was, cache in zip(before, caches, strict=True):
        was[[4, 2]] = was[1]
        assert np.array_equal(was, cache)
