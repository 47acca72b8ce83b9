"""The request fields of `/v1`: OpenAI's, with vLLM's extras, their types and ranges.

Owns the OpenAI dialect's table and defaults; what the checks do stands in `fields`. Fields that do not change the
answer (user, metadata, store, …) are known and left alone; what would change it and is not supported is refused.
"""

from __future__ import annotations

from typing import Any

from ovms_lora.server import constraints, inputs, tool_fields
from ovms_lora.server.bounds import Bound, at_most
from ovms_lora.server.fields import (
    INT64_MAX,
    UINT32_MAX,
    Check,
    Field,
    OnlyWith,
    Rule,
    Table,
    Together,
    Values,
    an_object,
    array,
    at_least,
    boolean,
    given,
    integer,
    items,
    needs_adapters,
    number,
    takes,
    text,
    that,
    unsupported,
    within,
)
from ovms_lora.server.sampling import SamplingDefaults


def _number(name: str, low: float, high: float) -> Field:
    message = f"{name} must be between {low} and {high}"
    return Field(name, number(f"{name} must be a number"), within(low, high, message))


def _integer(name: str, low: int, high: int = UINT32_MAX) -> Field:
    message = f"{name} must be between {low} and {high}"
    return Field(name, integer(f"{name} must be an integer"), within(low, high, message))


def _answers(name: str) -> Field:
    """A number of answers."""
    whole = integer(f"{name} must be an integer")
    numbers = Rule(whole, {"type": "integer", "minimum": 1, **at_most("maximum", "n")})
    return Field(name, numbers, Bound("n", f"{name} must be between 1 and {{limit}}", int, least=1))


def _boolean(name: str) -> Field:
    return Field(name, boolean(f"{name} must be true or false"))


def _ignored(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name) for name in names)


def _replaced(name: str) -> Field:
    """A field that vLLM had before `structured_outputs` and ignores now; here it is refused."""
    return Field(name, that(lambda _: False, f"{name} is not supported; use structured_outputs", {"not": {}}))


@takes(
    {
        "type": "object",
        **at_most("maxProperties", "logit_bias"),
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
)
def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("logit_bias must be an object")
    check: Check = number("logit_bias values must be numbers")
    bias: dict[int, float] = {}
    for token, strength in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise ValueError("logit_bias keys must be token ids")
        if not -100 <= check(strength) <= 100:
            raise ValueError("logit_bias values must be between -100 and 100")
        bias[int(token)] = float(strength)
    return bias


def _asked_tokens(values: Values) -> int:
    given_ones = [values[name] for name in ("max_completion_tokens", "max_tokens") if name in values]
    return given_ones[0] if given_ones else 0


_COMMON = (
    _boolean("stream"),
    Field(
        "stream_options",
        inputs.stream_options("include_usage", "continuous_usage_stats"),
        only_with=OnlyWith("stream", "Stream options can only be defined when `stream=True`."),
    ),
    _integer("max_tokens", 0),
    _number("temperature", 0, 2),
    Field(
        "top_p",
        number("top_p must be a number"),
        that(lambda value: 0 < value <= 1, "top_p must be in (0, 1]", {"exclusiveMinimum": 0, "maximum": 1}),
    ),
    _number("frequency_penalty", -2, 2),
    _number("presence_penalty", -2, 2),
    _answers("n"),
    _integer("seed", -INT64_MAX - 1, INT64_MAX),
    Field("stop", inputs.stop_strings, *inputs.STOPS),
    Field("logit_bias", _logit_bias, Bound("logit_bias", "logit_bias must have no more than {limit} entries")),
    # vLLM's extras
    _integer("top_k", -1),
    _number("min_p", 0, 1),
    Field(
        "repetition_penalty",
        number("repetition_penalty must be a number"),
        that(lambda value: value > 0, "repetition_penalty must be greater than zero", {"exclusiveMinimum": 0}),
    ),
    Field("length_penalty", number("length_penalty must be a number")),
    _boolean("use_beam_search"),
    _integer("min_tokens", 0),
    Field(
        "stop_token_ids",
        array("stop_token_ids must be an array"),
        items(integer("stop_token_ids must hold integers"), at_least(0, "stop_token_ids must not be negative")),
    ),
    _boolean("ignore_eos"),
    _boolean("skip_special_tokens"),
    _boolean("include_stop_str_in_output"),
    _integer("prompt_logprobs", 0, 20),
    _boolean("add_special_tokens"),
    Field("cache_salt", text("cache_salt must be a string")),
    Field("response_format", constraints.response_format),
    Field("structured_outputs", constraints.structured_outputs),
    Field("lora_alphas", inputs.lora_alphas),
    Field("lora", inputs.lora),
    _answers("best_of"),
    # What would change the answer, and cannot yet
    *map(_replaced, ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern")),
    unsupported("bad_words", []),
    unsupported("allowed_token_ids"),
    unsupported("truncate_prompt_tokens"),
    unsupported("logits_processors", []),
    unsupported("return_tokens_as_token_ids", False),
    unsupported("spaces_between_special_tokens", True),
    *_ignored("user", "request_id", "priority"),
)

_COMPLETIONS = (
    Field("prompt", inputs.prompts, inputs.PROMPTS, null=False, missing="prompt is missing"),
    _integer("logprobs", 0, 20),
    _boolean("echo"),
    unsupported("suffix", ""),
    unsupported("prompt_embeds"),
)

_CHAT = (
    Field("messages", inputs.messages, null=False, missing="messages is missing"),
    _integer("max_completion_tokens", 0),
    _boolean("logprobs"),
    _integer("top_logprobs", 0, 20),
    Field("tools", tool_fields.vllm_tools),
    Field("tool_choice", tool_fields.vllm_tool_choice),
    _boolean("parallel_tool_calls"),
    Field("chat_template_kwargs", an_object("chat_template_kwargs must be an object")),
    Field("reasoning_effort", text("reasoning_effort must be a string")),
    _boolean("add_generation_prompt"),
    unsupported("chat_template"),
    unsupported("continue_final_message", False),
    unsupported("echo", False),
    unsupported("functions", []),
    unsupported("function_call", "none", "auto"),
    unsupported("audio"),
    unsupported("modalities", ["text"]),
    unsupported("documents", []),
    unsupported("web_search_options"),
    *_ignored(
        "metadata", "store", "service_tier", "prediction", "safety_identifier",
        "prompt_cache_key", "verbosity",
    ),
)  # fmt: skip

_COMMON_TOGETHER = (
    Together(
        "max_tokens",
        lambda v, limits: limits.max_tokens_limit is not None and _asked_tokens(v) > limits.max_tokens_limit,
        "max_tokens must not be greater than {limits.max_tokens_limit}",
    ),
    Together("structured_outputs", lambda v, _: constraints.asks_twice(v), constraints.MULTIPLE_SPECIFIED),
    Together(
        "use_beam_search",
        lambda v, _: bool(v.get("use_beam_search") and v.get("stream")),
        "Streaming is not currently supported with beam search",
    ),
    Together(
        "best_of", lambda v, _: "best_of" in v and v["best_of"] < v.get("n", 1), "best_of must not be less than n"
    ),
    Together(
        "best_of",
        lambda v, _: v.get("best_of", 1) > v.get("n", 1) and bool(v.get("stream")),
        "best_of greater than n cannot be used with stream",
    ),
    Together(
        "best_of",
        lambda v, _: v.get("best_of", 1) > v.get("n", 1) and bool(v.get("use_beam_search")),
        "best_of greater than n cannot be used with use_beam_search",
    ),
    needs_adapters("lora_alphas"),
    needs_adapters("lora"),
)

_COMPLETIONS_TOGETHER = (
    *_COMMON_TOGETHER,
    Together(
        "max_tokens",
        lambda v, _: v.get("max_tokens") == 0 and not v.get("echo") and "prompt_logprobs" not in v,
        "max_tokens must be at least 1 unless echo is set",
    ),
    Together(
        "prompt_logprobs",
        lambda v, _: "prompt_logprobs" in v and bool(v.get("stream")),
        "prompt_logprobs is not available with stream",
    ),
)

_CHAT_TOGETHER = (
    *_COMMON_TOGETHER,
    Together(
        "max_tokens",
        lambda v, _: v.get("max_completion_tokens", v.get("max_tokens")) == 0,
        "max_tokens must be at least 1",
    ),
    Together(
        "top_logprobs",
        lambda v, _: v.get("top_logprobs", 0) > 0 and not v.get("logprobs"),
        "when using `top_logprobs`, `logprobs` must be set to true.",
    ),
    Together("prompt_logprobs", given("prompt_logprobs"), "prompt_logprobs is not supported for chat completions"),
    tool_fields.NEEDS_TOOLS,
    tool_fields.NAMES_A_TOOL,
    tool_fields.ONE_CONSTRAINT,
)

COMPLETIONS = Table((*_COMMON, *_COMPLETIONS), _COMPLETIONS_TOGETHER)
CHAT = Table((*_COMMON, *_CHAT), _CHAT_TOGETHER)

DEFAULTS = SamplingDefaults(top_k=0, stop_string_in_streams=False, best_of_searches=False)
