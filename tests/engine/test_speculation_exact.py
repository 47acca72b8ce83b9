"""Guessing ahead on real graphs in f32: the tokens of the model alone, adapters and constraints in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.draft_folder import check_draft_vocabulary
from ovms_lora.engine.step_cost import StepCost
from ovms_lora.engine.tokenizer import Tokenizer
from tests.engine.harness import Answer
from tests.engine.lora_models import Base, Bases, Served, prompt, serving

PROMPTS = [prompt(5) * 6, prompt(9, 1) * 3, prompt(33, 2), prompt(2, 3)]
SAMPLINGS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0.7, seed=3, max_tokens=40, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, presence_penalty=0.5, logprobs=1),
    SamplingParams(temperature=0, max_tokens=40, stop_token_ids=list(range(9, 280, 17)), logprobs=1),
]


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    return bases.get("llama")


@pytest.fixture(scope="module")
def adapters(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    targets = {"a": ["q_proj", "v_proj"], "b": ["o_proj", "gate_proj", "lm_head"]}
    return {
        alias: llama.adapter(folder / alias, seed=seed, target_modules=modules)
        for seed, (alias, modules) in enumerate(targets.items())
    }


@pytest.fixture(scope="module")
def plain(llama: Base, adapters: dict[str, Path]) -> Iterator[Served]:
    with serving(llama.folder, adapters) as model:
        yield model


@pytest.fixture(scope="module")
def expected(plain: Served) -> list[Answer]:
    return asked(plain)


def asked(served: Served) -> list[Answer]:
    """Send everything at once: every prompt with base and adapters, each sampled in its way, and one constrained."""
    uses = [(), served.lora.select("a"), served.lora.select("b")]
    requests = []
    for number, tokens in enumerate(PROMPTS):
        for place, use in enumerate(uses):
            sampling = SAMPLINGS[(number + place) % len(SAMPLINGS)]
            requests.append(GenerationRequest(f"{number}-{place}", tokens, sampling, use))
    schema = json.dumps({"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 4, "maxItems": 4})
    constraint = served.model.constraints.compile(ConstraintSpec(ConstraintKind.JSON_SCHEMA, schema), param="field")
    json_sampling = SamplingParams(temperature=0, max_tokens=40, logprobs=1)
    requests.append(GenerationRequest("json", PROMPTS[0], json_sampling, constraint=constraint))
    for request in requests:
        served.answers.forget(request.request_id)
    return together(served, requests)


def together(served: Served, requests: list[GenerationRequest]) -> list[Answer]:
    def submit() -> None:
        for request in requests:
            served.model.engine.submit(request)

    served.model.engine.call(submit)
    return served.wait(*requests)


def check_same(answers: list[Answer], expected: list[Answer]) -> None:
    for found, wanted in zip(answers, expected, strict=True):
        assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
        assert (found.finish_reason, found.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
        differences = [a.logprob - b.logprob for a, b in zip(found.logprobs, wanted.logprobs, strict=True)]
        assert np.abs(differences).max() < 1e-3


@pytest.mark.parametrize("guesses_with", ["lookup", "llama", "qwen3"])
def test_answers_are_those_of_the_model_alone(
    llama: Base,
    adapters: dict[str, Path],
    bases: Bases,
    expected: list[Answer],
    guesses_with: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepCost, "price", lambda *_: 0.0)
    path = "" if guesses_with == "lookup" else str(bases.get(guesses_with).folder)
    options = SpeculationOptions(draft_models_path=path, num_tokens=4)
    with serving(llama.folder, adapters, speculation=options) as served:
        check_same(asked(served), expected)
        check_same(asked(served), expected)  # once more, with prefixes in the cache
        stats = served.model.engine.stats().speculation
        assert served.model.engine.stats().kv_cache_usage == 0
    assert stats is not None
    assert stats.accepted_tokens > 0
    assert stats.accepted_tokens < stats.draft_tokens


def test_a_model_guesses_all_its_own_tokens(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "price", lambda *_: 0.0)
    options = SpeculationOptions(draft_models_path=str(llama.folder))
    requests = [GenerationRequest(f"{i}", tokens, SAMPLINGS[0]) for i, tokens in enumerate(PROMPTS)]
    with serving(llama.folder, speculation=options) as served:
        together(served, requests)
        stats = served.model.engine.stats().speculation
    assert stats is not None
    assert stats.accepted_tokens == stats.draft_tokens >= 4 * 30


def test_a_draft_model_of_other_tokens_is_refused(llama: Base, tmp_path: Path) -> None:
    tokenizer = json.loads((llama.folder / "tokenizer.json").read_text())
    ours = Tokenizer.from_folder(llama.folder)
    check_draft_vocabulary(llama.folder, ours)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFolderError, match=r"has other tokens than the model: 1[01] is") as error:
        check_draft_vocabulary(tmp_path, ours)
    assert error.value.hint == "take a draft model of the same family, with the same tokenizer"
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": len(vocabulary), "content": "<more>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFolderError, match=rf"has {ours.vocab_size + 1} tokens, not {ours.vocab_size}"):
        check_draft_vocabulary(tmp_path, ours)
