"""Selection, rank and scaling agree with PEFT's own functions, on paths and patterns of all sorts."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.adapters.peft_config import PeftConfig
from ovms_lora.adapters.targets import Targets
from ovms_lora.core.errors import AdapterError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
    from peft.utils.other import get_pattern_key

PATHS = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.vision.blocks.1.attn.q_proj",
    "layers.1.q_proj",
    "model.layers.2.xq_proj",
]
NAMES = ["q_proj", "proj", "lm_head", "self_attn.q_proj", "1.self_attn.q_proj", PATHS[1], "up_proj", "layers.1.q_proj"]


def peft_includes(config: PeftConfig, path: str) -> bool:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    theirs = SimpleNamespace(
        target_modules=config.target_modules if isinstance(config.target_modules, str) else set(config.target_modules),
        exclude_modules=plain(config.exclude_modules),
        layers_to_transform=plain(config.layers_to_transform),
        layers_pattern=plain(config.layers_pattern),
        modules_to_save=None,
    )
    found = check_target_module_exists(theirs, path)
    return bool(found) and not isinstance(found, _ExcludedModule)


@settings(max_examples=300, deadline=None)
@given(
    targets=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True),
    excluded=st.one_of(st.lists(st.sampled_from(NAMES), max_size=2), st.sampled_from(["", r".*\.1\..*", "lm_head"])),
    layers=st.one_of(st.none(), st.lists(st.integers(0, 11), min_size=1, max_size=3)),
    pattern=st.lists(st.sampled_from(["layers", "blocks", "model.layers", "model.l.yers", "experts"]), max_size=2),
)
def test_includes_what_peft_includes(
    targets: list[str], excluded: list[str] | str, layers: list[int] | None, pattern: list[str]
) -> None:
    config = PeftConfig(
        target_modules=tuple(targets),
        exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
        layers_to_transform=None if layers is None else tuple(layers),
        layers_pattern=tuple(pattern) if layers is not None else (),
    )
    ours = Targets(config, output_head="lm_head")
    for path in PATHS:
        assert ours.include(path) is peft_includes(config, path), path


@pytest.mark.parametrize("text", ["q_proj", r".*q_proj", r".*\.\d\.self_attn\..*|lm_head", "lm_head"])
def test_an_expression_is_for_the_whole_path(text: str) -> None:
    config = PeftConfig(target_modules=text)
    ours = Targets(config, output_head="lm_head")
    assert [ours.include(path) for path in PATHS] == [peft_includes(config, path) for path in PATHS]


def test_all_linear_leaves_out_the_head_alone() -> None:
    ours = Targets(PeftConfig(target_modules="all-linear"), output_head="lm_head")
    assert [path for path in PATHS if not ours.include(path)] == ["lm_head"]


KEYS = [
    *NAMES,
    "self_attn.q_pro.",
    "attn.q_proj",
    "self.attn.q_proj",
    "^lm_head",
    "^q_proj",
    "q_proj$",
    r"^model\.layers\.1\.self_attn\.q_proj$",
    r"layers\.1\.self_attn.q_proj",
    r".*\.1\..*",
    r"layers\.\d+\.self_attn\.(q|k)_proj",
    "(q|up)_proj",
    "q_proj|lm_head",
    "",
]


@settings(max_examples=300, deadline=None)
@given(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
def test_the_first_key_that_fits_gives_rank_and_alpha(keys: list[str]) -> None:
    ranks = {key: number for number, key in enumerate(keys, start=2)}
    alphas = {key: 0.5 * number for number, key in enumerate(keys, start=2)}
    config = PeftConfig(target_modules=("x",), r=32, lora_alpha=48, rank_pattern=ranks, alpha_pattern=alphas)
    ours = Targets(config, output_head=None)
    for path in PATHS:
        key = get_pattern_key(keys, path)
        scale = ours.scale(path)
        assert scale.rank == ranks.get(key, 32), path
        assert scale.scaling == pytest.approx(alphas.get(key, 48) / scale.rank), path


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    ours = Targets(PeftConfig(target_modules=("x",), r=16, lora_alpha=8, use_rslora=True), output_head=None)
    assert ours.scale("lm_head").scaling == 2


def test_a_layers_pattern_that_is_an_expression_is_refused() -> None:
    config = PeftConfig(target_modules=("q_proj",), layers_to_transform=(1,), layers_pattern=("(layers|blocks)+",))
    with pytest.raises(AdapterError, match="layers_pattern") as caught:
        Targets(config, output_head=None)
    assert caught.value.code == "adapter_unsupported"
