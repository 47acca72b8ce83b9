"""SamplingParams: how the tokens of one request are chosen, and when it stops. Names and defaults are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

EarlyStopping = bool | Literal["never"]

_MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError that names the field where a value makes no sense.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps every token. `max_tokens` None means until the model's length.
    `logprobs` k asks for the k best alternatives beside each chosen token; `prompt_logprobs` likewise for the prompt.
    `repetition_penalty` counts prompt and output; `presence_penalty` and `frequency_penalty` count output only, as
    in OpenAI's formula.

    `beam_width` above 1 replaces sampling by beam search, of which `n` are the best results: a score is divided by
    length ** `length_penalty`, and `early_stopping` says when no better result is waited for, as in transformers.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        # None, vLLM's default for these, says the same as nothing.
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", self.logit_bias or {})
        self._check()

    def _check(self) -> None:
        finite = (
            *(self.temperature, self.top_p, self.min_p, self.presence_penalty, self.frequency_penalty),
            self.length_penalty,
        )
        rules = (
            (self.n >= 1, f"n must be at least 1, got {self.n}."),
            (all(math.isfinite(value) for value in finite), "sampling values must be finite numbers."),
            (self.seed is None or self.seed >= 0, f"seed must be non-negative, got {self.seed}."),
            (all(math.isfinite(bias) for bias in self.logit_bias.values()), "logit_bias must hold finite numbers."),
            (self.temperature >= 0, f"temperature must be non-negative, got {self.temperature}."),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}."),
            (self.top_k >= -1, f"top_k must be 0 (disable), or at least 1, got {self.top_k}."),
            (0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}."),
            (-2 <= self.presence_penalty <= 2, f"presence_penalty must be in [-2, 2], got {self.presence_penalty}."),
            (-2 <= self.frequency_penalty <= 2, f"frequency_penalty must be in [-2, 2], got {self.frequency_penalty}."),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty must be greater than zero, got {self.repetition_penalty}.",
            ),
            (
                self.max_tokens is None or self.max_tokens >= 0,
                f"max_tokens must not be negative, got {self.max_tokens}.",
            ),
            (self.min_tokens >= 0, f"min_tokens must be greater than or equal to 0, got {self.min_tokens}."),
            (
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}.",
            ),
            (all(self.stop), "stop cannot contain an empty string."),
            (
                self.logprobs is None or 0 <= self.logprobs <= _MAX_LOGPROBS,
                f"logprobs must be between 0 and {_MAX_LOGPROBS}, got {self.logprobs}.",
            ),
            (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= _MAX_LOGPROBS,
                f"prompt_logprobs must be between 0 and {_MAX_LOGPROBS}, got {self.prompt_logprobs}.",
            ),
            (self.beam_width >= 1, f"beam_width must be at least 1, got {self.beam_width}."),
            (
                self.beam_width == 1 or self.n <= self.beam_width,
                f"n must be less than or equal to beam_width={self.beam_width}, got {self.n}.",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise ValueError(message)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0
