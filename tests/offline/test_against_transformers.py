"""On a real device: the tokens of transformers and PEFT, with two adapters and the base mixed in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ovms_lora import LLM, LoRARequest, SamplingParams
from ovms_lora.core.errors import ArgumentError
from tests.engine.lora_models import LINEARS, PRECISE, Base, log_probabilities, prompt

TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [prompt(5), prompt(40), prompt(11), prompt(3), prompt(70), prompt(24)]


def load(folder: Path, **settings: Any) -> LLM:
    properties = {"INFERENCE_NUM_THREADS": 1, **PRECISE}
    return LLM(folder, plugin_config=properties, lora_dtype="f32", max_num_seqs=4, **settings)


@pytest.fixture(scope="module")
def folders(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": llama.adapter(folder / "one", seed=5, target_modules=["q_proj", "v_proj"]),
        "two": llama.adapter(folder / "two", seed=6, target_modules=list(LINEARS), r=20),
        "wide": llama.adapter(folder / "wide", seed=7, target_modules=["q_proj"], r=65),
    }


@pytest.fixture(scope="module")
def llm(llama: Base) -> Iterator[LLM]:
    with load(llama.folder, enable_lora=True) as made:
        yield made


@pytest.fixture(scope="module")
def expected(llama: Base, folders: dict[str, Path]) -> Callable[[str | None, Sequence[int]], list[int]]:
    oracles = {name: llama.with_peft((folder, 1.0)) for name, folder in folders.items() if name != "wide"}

    def tokens(name: str | None, given: Sequence[int]) -> list[int]:
        model, known = oracles[name] if name else llama.torch, list(given)
        for _ in range(TOKENS):
            known.append(int(log_probabilities(model, known)[-1].argmax()))
        return known[len(given) :]

    return tokens


Expected = Callable[[str | None, Sequence[int]], list[int]]


def test_two_adapters_and_the_base_in_one_call(llm: LLM, folders: dict[str, Path], expected: Expected) -> None:
    requests = {name: LoRARequest(name, number, folders[name]) for number, name in enumerate(("one", "two"), start=1)}
    names = ["one", None, "two", "two", None, "one"]
    outputs = llm.generate(PROMPTS, GREEDY, False, [requests[name] if name else None for name in names])
    for name, given, output in zip(names, PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == list(given)
        assert output.outputs[0].token_ids == expected(name, given), f"{name}, prompt of {len(given)} tokens"


def test_settings_are_laid_over_those_of_the_folder(llm: LLM) -> None:
    options = llm._loaded.options
    assert (options.max_num_seqs, options.max_num_batched_tokens, options.device) == (4, 256, "CPU")
    assert options.plugin_config["KV_CACHE_PRECISION"] == "f32"


def test_a_model_without_adapters_needs_no_enable_lora(llama: Base, expected: Expected) -> None:
    with load(llama.folder) as plain:
        outputs = plain.generate(PROMPTS, GREEDY, False)
    assert [output.outputs[0].token_ids for output in outputs] == [expected(None, given) for given in PROMPTS]


def test_a_merged_model_gives_what_its_adapter_gives(
    llama: Base, folders: dict[str, Path], tmp_path: Path, expected: Expected
) -> None:
    with load(llama.merged(tmp_path / "merged", folders["two"])) as merged:
        outputs = merged.generate(PROMPTS[:2], GREEDY, False)
    assert [output.outputs[0].token_ids for output in outputs] == [expected("two", given) for given in PROMPTS[:2]]


def test_log_probabilities_are_those_of_pytorch(llm: LLM, llama: Base) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate(PROMPTS[2], sampling, False)
    (completion,) = output.outputs
    rows = log_probabilities(llama.torch, [*PROMPTS[2], *completion.token_ids])
    found = [*(output.prompt_logprobs or [])[1:], *(completion.logprobs or [])]
    assert len(found) == len(rows) - 1
    for row, each in zip(rows, found, strict=False):
        assert each is not None
        assert all(abs(row[token] - value.logprob) < 0.01 for token, value in each.items())


def test_several_continuations_with_a_seed_do_not_depend_on_the_batch(llm: LLM) -> None:
    sampling = SamplingParams(n=3, seed=11, max_tokens=TOKENS, ignore_eos=True)
    (alone,) = llm.generate(PROMPTS[0], sampling, False)
    among = llm.generate(PROMPTS, sampling, False)[0]
    tokens = [completion.token_ids for completion in alone.outputs]
    assert tokens == [completion.token_ids for completion in among.outputs]
    assert len({tuple(each) for each in tokens}) == 3


def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(llm: LLM, folders: dict[str, Path]) -> None:
    request = LoRARequest("wide", 9, folders["wide"])
    with pytest.raises(ArgumentError, match=r"Loading lora wide failed: LoRA rank 65 is greater than max_lora_rank 64"):
        llm.generate(PROMPTS, GREEDY, False, request)


def test_two_llms_in_one_process_give_the_same(llm: LLM, llama: Base) -> None:
    with load(llama.folder) as other:
        both = [each.generate(PROMPTS[1], GREEDY, False)[0].outputs[0] for each in (llm, other)]
    assert both[0] == both[1]
