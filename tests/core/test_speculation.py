"""vLLM's speculative_config: what it means here, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ovms_lora.core.errors import ConfigError
from ovms_lora.core.speculation import SpeculationOptions, parse_speculative_config


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        ({"method": "ngram"}, 5, 5),
        ({"model": "ngram"}, 5, 5),
        ({"model": "[ngram]", "method": "ngram"}, 5, 5),
        ({"method": "ngram", "prompt_lookup_max": 4}, 4, 4),
        ({"method": "ngram", "prompt_lookup_min": 2}, 2, 2),
        ({"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}, 2, 4),
    ],
)
def test_lookups_are_as_vllm_has_them(config: dict[str, Any], low: int, high: int) -> None:
    found = parse_speculative_config({"num_speculative_tokens": 7, **config})
    assert found == SpeculationOptions(num_tokens=7, max_ngram_size=high, min_ngram_size=low)
    assert found.looks_up


@pytest.mark.parametrize("method", [{}, {"method": "draft_model"}])
def test_a_model_is_a_draft_model(method: dict[str, str]) -> None:
    found = parse_speculative_config({"num_speculative_tokens": 3, "model": "models/draft", **method})
    assert (found.draft_models_path, found.num_tokens, found.looks_up) == ("models/draft", 3, False)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"method": "ngram"}, "num_speculative_tokens: is missing", "add it"),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            "num_speculative_tokens: .*greater than or equal",
            "correct",
        ),
        ({"num_speculative_tokens": 2}, "give a model, or the method ngram", "like"),
        ({"num_speculative_tokens": 2, "method": "draft_model"}, "give a model, or the method ngram", "like"),
        ({"num_speculative_tokens": 2, "method": "ngram", "model": "m"}, "give a model, or the method ngram", "like"),
        ({"num_speculative_tokens": 2, "method": "eagle3", "model": "m"}, "method: Input should be", "correct"),
        ({"num_speculative_tokens": 2, "model": "m", "prompt_lookup_max": 3}, "go with the method ngram", "leave"),
        (
            {"num_speculative_tokens": 2, "method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "prompt_lookup_min=3 cannot be larger than prompt_lookup_max=2",
            "exchange",
        ),
        (
            {"num_speculative_tokens": 2, "model": "m", "quantization": "fp8"},
            "quantization: unknown key",
            "the keys are",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(config: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_speculative_config(config)
    assert hint in (error.value.hint or "")
