"""Speculation: guessing the next tokens of a text, so that one step checks several; how models and requests ask for it.

Owns the options with OVMS's defaults, and vLLM's `speculative_config` as another way to write them. Answers are the
same with it and without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ovms_lora.core.config_fault import fault_of
from ovms_lora.core.errors import ConfigError, ModelFolderError
from ovms_lora.core.strict_model import LocalPath, StrictModel, refusal

_NGRAM_MODELS = ("ngram", "[ngram]")  # vLLM takes these names of a model for the method
_VLLM_NGRAM = 5  # vLLM's length of what is looked up where neither bound is given


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationOptions:
    """How a model guesses: with the draft model of `draft_models_path`, or by looking its last tokens up in the text.

    `draft_models_path` is absolute or relative to the model's folder; `draft_device` empty is the model's own, and
    `draft_cache_size` the draft's KV cache in GB, 0 for a size from free memory. At most `num_tokens` are guessed at a
    time; what is looked up has at most `max_ngram_size` tokens, and at least `min_ngram_size`. Requests may change
    `num_tokens` and `max_ngram_size`.
    """

    draft_models_path: str = ""
    draft_device: str = ""
    draft_cache_size: int = 0
    num_tokens: int = 5
    max_ngram_size: int = 3
    min_ngram_size: int = 1

    @property
    def looks_up(self) -> bool:
        """Whether guesses come from the text itself, not from a draft model."""
        return not self.draft_models_path


def take_prompt_lookup(properties: dict[str, Any]) -> bool | None:
    """Take OVMS's `prompt_lookup` out of a plugin_config, where it stands among the properties of the device.

    None when it is not there. Raises ModelFolderError when it is neither true nor false.
    """
    value = properties.pop("prompt_lookup", None)
    if value is not None and not isinstance(value, bool):
        raise ModelFolderError(
            "plugin_config: prompt_lookup must be true or false", hint='like {"prompt_lookup": true}'
        )
    return value


@dataclass(frozen=True, slots=True)
class Assistance:
    """What one request says of guesses, in OVMS's terms; None leaves it to the model's options.

    With a `confidence` above 0 a draft model guesses on as long as it gives its best token that probability.
    """

    num_tokens: int | None = None
    max_ngram_size: int | None = None
    confidence: float = 0.0


Count = Annotated[int, Field(ge=1)]


class SpeculativeConfig(StrictModel):
    """vLLM's `speculative_config`: the methods `ngram` and `draft_model`, with the keys that these have."""

    num_speculative_tokens: Count
    method: Literal["ngram", "draft_model"] | None = None
    model: LocalPath | None = None
    prompt_lookup_max: Count | None = None
    prompt_lookup_min: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names_draft = self.model is not None and self.model not in _NGRAM_MODELS
        if names_draft == self._looks_up:
            raise refusal("give a model, or the method ngram", hint='like {"method": "ngram", …} or {"model": DIR, …}')
        if names_draft and (self.prompt_lookup_max or self.prompt_lookup_min):
            raise refusal("prompt_lookup_max and prompt_lookup_min go with the method ngram", hint="leave them out")
        low, high = self._ngram
        if low > high:
            message = f"prompt_lookup_min={low} cannot be larger than prompt_lookup_max={high}"
            raise refusal(message, hint="exchange them")
        return self

    @property
    def options(self) -> SpeculationOptions:
        """The same in this package's terms."""
        if not self._looks_up:
            return SpeculationOptions(draft_models_path=self.model or "", num_tokens=self.num_speculative_tokens)
        low, high = self._ngram
        return SpeculationOptions(num_tokens=self.num_speculative_tokens, max_ngram_size=high, min_ngram_size=low)

    @property
    def _looks_up(self) -> bool:
        return self.method == "ngram" or self.model in _NGRAM_MODELS

    @property
    def _ngram(self) -> tuple[int, int]:
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        return low or high or _VLLM_NGRAM, high or low or _VLLM_NGRAM


def parse_speculative_config(value: Mapping[str, Any]) -> SpeculationOptions:
    """Return what vLLM's `speculative_config` asks for. Raises ConfigError with the key that is wrong."""
    try:
        return SpeculativeConfig.model_validate(value).options
    except ValidationError as error:
        fault = fault_of(error)
        hint = f"the keys are {', '.join(SpeculativeConfig.model_fields)}" if "unknown" in fault.message else fault.hint
        raise ConfigError(f"{fault.place}: {fault.message}", hint=hint) from error
