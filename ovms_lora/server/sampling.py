"""From checked fields to SamplingParams: request → generation_config.json → the dialect's defaults.

Owns that order and the meaning of the fields; knows nothing of how they were checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import Assistance
from ovms_lora.server.fields import INT64_MAX

if TYPE_CHECKING:
    from ovms_lora.engine.model import GenerationDefaults
    from ovms_lora.server.fields import Values

# top_p 0 is allowed by OVMS and keeps the most probable token only.
_SMALLEST_TOP_P = 1e-6


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Where the dialects differ when neither the request nor the model's folder says anything.

    `top_k` 0 keeps every token; `stop_string_in_streams` tells whether a stream holds the matched stop string unless
    the request says otherwise. `best_of` is the width of a beam search where `best_of_searches`; else so many
    continuations are sampled and the most probable ones returned.
    """

    top_k: int
    stop_string_in_streams: bool
    best_of_searches: bool


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How many tokens a prompt may be followed by: what was asked for (None: as many as fit), and the default."""

    asked: int | None
    default: int | None

    def for_prompt(self, prompt_tokens: int, max_model_len: int) -> int:
        """Return max_tokens for one prompt; the engine refuses what does not fit."""
        if self.asked is not None:
            return self.asked
        room = max(1, max_model_len - prompt_tokens)
        return room if self.default is None else min(room, self.default)


def token_budget(
    values: Values, model: GenerationDefaults, max_tokens_limit: int | None, fallback: int | None
) -> TokenBudget:
    """Return the token budget of a request; the model's `max_tokens_limit` bounds the default."""
    asked = values.get("max_completion_tokens", values.get("max_tokens"))
    bounds = [model.max_new_tokens if model.max_new_tokens is not None else fallback, max_tokens_limit]
    return TokenBudget(asked, min((bound for bound in bounds if bound is not None), default=None))


def sampling_params(values: Values, model: GenerationDefaults, dialect: SamplingDefaults) -> SamplingParams:
    """Return how the request is sampled, all but max_tokens, which depends on the prompt.

    Raises InvalidFieldError where SamplingParams refuses a value.
    """

    def pick(name: str, default: Any) -> Any:
        value = values.get(name, getattr(model, name, None))
        return default if value is None else value

    stop_in_output = values.get("include_stop_str_in_output")
    if stop_in_output is None:
        stop_in_output = dialect.stop_string_in_streams and bool(values.get("stream"))
    try:
        return SamplingParams(
            n=values.get("n", 1),
            # A search of width 1 is greedy decoding.
            temperature=0.0 if values.get("use_beam_search") else pick("temperature", 1.0),
            top_p=max(pick("top_p", 1.0), _SMALLEST_TOP_P),
            top_k=max(pick("top_k", dialect.top_k), 0),
            min_p=pick("min_p", 0.0),
            seed=_seed(values.get("seed")),
            max_tokens=None,
            min_tokens=values.get("min_tokens", 0),
            stop=values.get("stop", ()),
            stop_token_ids=tuple(values.get("stop_token_ids", ())),
            ignore_eos=values.get("ignore_eos", False),
            include_stop_str_in_output=stop_in_output,
            skip_special_tokens=values.get("skip_special_tokens", True),
            presence_penalty=values.get("presence_penalty", 0.0),
            frequency_penalty=values.get("frequency_penalty", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            beam_width=_beam_width(values, dialect),
            length_penalty=pick("length_penalty", 1.0),
            early_stopping=pick("early_stopping", False),
            logit_bias=values.get("logit_bias", {}),
            logprobs=_logprobs(values),
            prompt_logprobs=_prompt_logprobs(values),
        )
    except ValueError as error:
        message = str(error)
        raise InvalidFieldError(message, param=message.split(" ", 1)[0]) from error


def assistance(values: Values) -> Assistance:
    """Return how the request's next tokens are to be guessed; a longest n-gram of 0 is the model's own, as in OVMS."""
    return Assistance(
        num_tokens=values.get("num_assistant_tokens"),
        max_ngram_size=values.get("max_ngram_size") or None,
        confidence=values.get("assistant_confidence_threshold", 0.0),
    )


def sampled_candidates(values: Values, dialect: SamplingDefaults) -> int:
    """Return how many continuations are sampled for each prompt, to return the `n` best of."""
    n: int = values.get("n", 1)
    return n if dialect.best_of_searches else max(n, values.get("best_of", 1))


def _beam_width(values: Values, dialect: SamplingDefaults) -> int:
    # vLLM has no field for the width: `n` is both that and the number of results.
    width: int = values.get("best_of" if dialect.best_of_searches else "n", 1)
    return width if dialect.best_of_searches or values.get("use_beam_search") else 1


def _seed(seed: int | None) -> int | None:
    # OpenAI's seeds may be negative, the generators' may not.
    return None if seed is None else seed & INT64_MAX


def _logprobs(values: Values) -> int | None:
    asked = values.get("logprobs")
    if isinstance(asked, bool):
        return values.get("top_logprobs", 0) if asked else None
    return asked


def _prompt_logprobs(values: Values) -> int | None:
    asked: int | None = values.get("prompt_logprobs")
    if asked is None and values.get("echo"):
        return _logprobs(values)
    return asked
