"""PEFT is the oracle: log-probabilities of prompt and generated tokens, for everything that an adapter may be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.request import AdapterUse
from ovms_lora.engine.lora_config import AdapterSpec, CompositeSpec, LoraConfig
from tests.adapters.adapter_files import safetensors_bytes
from tests.engine.lora_models import (
    FAMILIES,
    LINEARS,
    Ask,
    Base,
    Bases,
    Served,
    drift,
    log_probabilities,
    prompt,
    serving,
)

TOLERANCE = 0.02
PROMPT = prompt(21)
ASK = Ask(PROMPT, max_tokens=9, logprobs=20, prompt_logprobs=20)
ALL = [*LINEARS, "lm_head"]

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rank 1": {"target_modules": ALL, "r": 1, "lora_alpha": 2},
    "rank 3": {"target_modules": ALL, "r": 3, "lora_alpha": 6},
    "rank 16": {"target_modules": ALL, "r": 16, "lora_alpha": 16},
    "rank 64": {"target_modules": ALL, "r": 64, "lora_alpha": 64},
    "rank 256": {"target_modules": ALL, "r": 256, "lora_alpha": 256},
    "rslora": {"target_modules": list(LINEARS), "r": 8, "use_rslora": True},
    "rank_pattern": {"target_modules": list(LINEARS), "rank_pattern": {"q_proj": 9, "1.mlp.down_proj": 2}},
    "alpha_pattern": {"target_modules": list(LINEARS), "alpha_pattern": {"v_proj": 1, r"layers\.0\.mlp\..*": 16}},
    "both patterns, rslora": {
        "target_modules": list(LINEARS),
        "use_rslora": True,
        "rank_pattern": {"k_proj": 1, "o_proj": 17},
        "alpha_pattern": {"k_proj": 2, "up_proj": 3},
    },
    "one layer": {"target_modules": list(LINEARS), "layers_to_transform": 1},
    "layers of a pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    **{f"only {linear}": {"target_modules": [linear]} for linear in ALL},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "an expression": {"target_modules": r".*\.1\.(self_attn\.[kv]_proj|mlp\.gate_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "float16": {"target_modules": ALL, "dtype": "float16"},
    "bfloat16": {"target_modules": ALL, "dtype": "bfloat16"},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "rslora in float16": {"target_modules": ALL, "r": 32, "use_rslora": True, "dtype": "float16"},
    "patterns that name the head": {
        "target_modules": ALL,
        "rank_pattern": {"lm_head": 9},
        "alpha_pattern": {"lm_head": 3},
    },
}


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    return bases.get("llama")


@pytest.fixture(scope="module")
def parts(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different ranks and targets."""
    folder = tmp_path_factory.mktemp("parts")
    settings: dict[str, dict[str, Any]] = {
        "wide": {"target_modules": ALL, "r": 5},
        "attention": {"target_modules": ["q_proj", "k_proj", "o_proj"], "r": 16},
        "head": {"target_modules": ["lm_head", "down_proj"], "r": 1},
    }
    return {
        name: llama.adapter(folder / name, seed=40 + number, **each)
        for number, (name, each) in enumerate(settings.items())
    }


@pytest.fixture(scope="module")
def served(llama: Base, parts: dict[str, Path]) -> Iterator[Served]:
    with serving(llama.folder, parts, total_rank=288, max_lora_rank=256) as model:
        yield model


def uses(served: Served, folder: Path) -> tuple[AdapterUse, ...]:
    served.lora.load(AdapterSpec("tested", folder), replace=True)
    return served.lora.select("tested")


def check(served: Served, base: Base, adapters: tuple[AdapterUse, ...], oracle: Any) -> None:
    """Compare a request's numbers with PEFT's, which must not be those of the base."""
    (answer,) = served.together(replace(ASK, adapters=adapters))
    tokens = [*PROMPT, *answer.token_ids]
    assert drift(answer, PROMPT, log_probabilities(oracle, tokens)) <= TOLERANCE
    assert drift(answer, PROMPT, log_probabilities(base.torch, tokens)) > 5 * TOLERANCE, "the adapter does nothing"


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_gives_the_numbers_of_peft(feature: str, served: Served, llama: Base, tmp_path: Path) -> None:
    folder = llama.adapter(tmp_path / "adapter", **FEATURES[feature])
    check(served, llama, uses(served, folder), llama.with_peft((folder, 1.0)))


def test_each_row_of_a_mixed_batch_has_the_numbers_of_its_own_peft_model(
    served: Served, llama: Base, parts: dict[str, Path]
) -> None:
    rows: list[dict[str, float]] = [
        {},
        {"wide": 1.0},
        {"attention": 1.0},
        {},
        {"head": 1.0},
        {"wide": 0.7, "head": -1.0},
    ]
    prompts = [prompt(length, seed=5) for length in (3, 33, 1, 64, 17, 40)]
    asks = [
        replace(ASK, prompt=tokens, adapters=served.lora.blend(list(row.items())))
        for tokens, row in zip(prompts, rows, strict=True)
    ]
    for row, tokens, answer in zip(rows, prompts, served.together(*asks), strict=True):
        oracle = llama.with_peft(*((parts[name], alpha) for name, alpha in row.items()))
        assert drift(answer, tokens, log_probabilities(oracle, [*tokens, *answer.token_ids])) <= TOLERANCE


def test_the_base_beside_adapters_is_the_base(served: Served, llama: Base) -> None:
    (answer,) = served.together(ASK)
    assert drift(answer, PROMPT, log_probabilities(llama.torch, [*PROMPT, *answer.token_ids])) <= TOLERANCE


def test_names_without_the_prefix_of_peft(served: Served, llama: Base, tmp_path: Path) -> None:
    folder = llama.adapter(tmp_path / "adapter", target_modules=list(LINEARS))
    oracle = llama.with_peft((folder, 1.0))
    (use,) = uses(served, folder)
    tensors = {}
    for path, pair in use.adapter.layers.items():  # type: ignore[attr-defined]  # a loaded one
        tensors[f"{path}.lora_A.weight"] = pair.a
        tensors[f"{path}.lora_B.weight"] = pair.b
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    check(served, llama, uses(served, folder), oracle)


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ALL])
def test_a_tied_head(targets: list[str], bases: Bases, tmp_path: Path) -> None:
    tied = bases.get("tied")
    folder = tied.adapter(tmp_path / "adapter", target_modules=targets)
    with serving(tied.folder, {"head": folder}) as model:
        check(model, tied, model.lora.select("head"), tied.with_peft((folder, 1.0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, bases: Bases, tmp_path: Path) -> None:
    base = bases.get(family)
    fused = family == "phi3"
    some = ["qkv_proj", "down_proj"] if fused else ["q_proj", "v_proj", "up_proj"]
    rest = ["gate_up_proj", "o_proj", "lm_head"] if fused else ["k_proj", "o_proj", "lm_head"]
    folders = {
        "all": base.adapter(tmp_path / "all", target_modules="all-linear"),
        "some": base.adapter(tmp_path / "some", target_modules=some, r=7, seed=2),
        "rest": base.adapter(tmp_path / "rest", target_modules=rest, r=2, seed=3),
    }
    with serving(base.folder, folders) as model:
        for name, folder in folders.items():
            check(model, base, model.lora.select(name), base.with_peft((folder, 1.0)))
        blend = model.lora.blend([("some", 0.7), ("rest", -0.5)])
        check(model, base, blend, base.with_peft((folders["some"], 0.7), (folders["rest"], -0.5)))


BLENDS: dict[str, dict[str, float]] = {
    "two": {"wide": 0.7, "attention": 0.5},
    "three": {"wide": 1.0, "attention": 0.3, "head": 0.8},
    "negative": {"wide": 1.0, "attention": -0.6},
    "no overlap": {"attention": 1.3, "head": 0.4},
    "zero": {"attention": 0.0, "wide": 1.0},
    "strong": {"head": 2.5},
}


@pytest.mark.parametrize("blend", BLENDS)
def test_a_blend_is_the_weighted_sum(blend: str, served: Served, llama: Base, parts: dict[str, Path]) -> None:
    strengths = BLENDS[blend]
    oracle = llama.with_peft(*((parts[name], alpha) for name, alpha in strengths.items()))
    check(served, llama, served.lora.blend(list(strengths.items())), oracle)


def test_a_blend_is_what_peft_makes_of_it_by_concatenation(
    served: Served, llama: Base, tmp_path: Path, parts: dict[str, Path]
) -> None:
    targets = ["q_proj", "down_proj"]
    other = llama.adapter(tmp_path / "other", target_modules=targets, r=3, seed=9)
    one = llama.adapter(tmp_path / "one", target_modules=targets, r=6, seed=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        oracle = PeftModel.from_pretrained(copy.deepcopy(llama.torch), str(one), adapter_name="one")
        oracle.load_adapter(str(other), adapter_name="other")
        oracle.add_weighted_adapter(["one", "other"], [0.7, 0.5], "mix", combination_type="cat")
        oracle.set_adapter("mix")
    served.lora.load(AdapterSpec("one", one))
    served.lora.load(AdapterSpec("other", other))
    check(served, llama, served.lora.blend([("one", 0.7), ("other", 0.5)]), oracle)
    served.lora.unload("one")
    served.lora.unload("other")


def test_an_adapter_twice_in_a_blend_counts_twice(served: Served, llama: Base, parts: dict[str, Path]) -> None:
    oracle = llama.with_peft((parts["wide"], 1.25))
    check(served, llama, served.lora.blend([("wide", 0.5), ("wide", 0.75)]), oracle)


def test_a_composite_has_its_strengths_and_a_request_its_own(llama: Base, parts: dict[str, Path]) -> None:
    specs = tuple(AdapterSpec(alias, folder, alpha=0.5) for alias, folder in parts.items())
    mix = CompositeSpec("mix", (("wide", 0.7), ("head", None)))
    options = LoraConfig().options.model_copy(update={"lora_dtype": "f32"})
    with serving(llama.folder, lora=LoraConfig(options, specs, (mix,))) as model:
        select = model.lora.select
        check(model, llama, select("mix"), llama.with_peft((parts["wide"], 0.7), (parts["head"], 0.5)))
        own = select("mix", {"head": 1.5})
        check(model, llama, own, llama.with_peft((parts["wide"], 0.7), (parts["head"], 1.5)))
        check(model, llama, select("attention"), llama.with_peft((parts["attention"], 0.5)))
        check(model, llama, select("attention", {"attention": 1.0}), llama.with_peft((parts["attention"], 1.0)))


def test_merged_is_runtime_is_peft(served: Served, llama: Base, parts: dict[str, Path], tmp_path: Path) -> None:
    folder = llama.merged(tmp_path / "merged", parts["wide"])
    oracle = llama.with_peft((parts["wide"], 1.0))
    asks = [Ask(prompt(length), max_tokens=16) for length in (3, 17, 40)]
    with serving(folder) as merged:
        expected = merged.tokens(*asks)
        (answer,) = merged.together(ASK)
    assert drift(answer, PROMPT, log_probabilities(oracle, [*PROMPT, *answer.token_ids])) <= TOLERANCE
    adapters = served.lora.select("wide")
    assert served.tokens(*(replace(ask, adapters=adapters) for ask in asks)) == expected
    for ask, tokens in zip(asks, expected, strict=True):
        rows = log_probabilities(oracle, [*ask.prompt, *tokens])[len(ask.prompt) - 1 : -1]
        assert rows.argmax(-1).tolist() == tokens
