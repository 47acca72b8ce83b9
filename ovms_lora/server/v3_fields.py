"""The request fields of `/v3`, row for row the table of contract section 4: types, ranges and OVMS's messages.

Owns the OVMS dialect's table and defaults; what the checks do stands in `fields`.
"""

from __future__ import annotations

from ovms_lora.server import constraints, inputs, tool_fields
from ovms_lora.server.fields import (
    PROMPT_LOOKUP,
    UINT32_MAX,
    Check,
    Field,
    OnlyWith,
    Table,
    Together,
    an_object,
    at_least,
    boolean,
    integer,
    needs_adapters,
    number,
    text,
    that,
    uint32,
    within,
)
from ovms_lora.server.sampling import SamplingDefaults

_COUNT_LIMIT = "{} value can't be greater than 4294967295"


def _unsigned(name: str) -> tuple[Check]:
    message = f"{name} is not an unsigned integer"
    return (uint32(message, message),)


_COMMON = (
    Field("stream"),
    Field(
        "stream_options",
        inputs.stream_options("include_usage"),
        only_with=OnlyWith("stream", "stream_options provided, but stream not set to true"),
    ),
    Field(
        "max_tokens",
        uint32("max_tokens is not an unsigned integer", _COUNT_LIMIT.format("max_tokens")),
        null=False,
    ),
    Field(
        "temperature",
        number("temperature is not a valid number"),
        within(0, 2, "temperature out of range(0.0, 2.0)"),
    ),
    Field("top_p", number("top_p is not a valid number"), within(0, 1, "top_p out of range(0.0, 1.0)")),
    Field(
        "min_p",
        number("min_p is not a valid number"),
        that(
            lambda value: 0 <= value < 1,
            "min_p out of range [0.0, 1.0)",
            {"minimum": 0, "exclusiveMaximum": 1},
        ),
    ),
    Field(
        "top_k",
        integer("top_k is not an integer"),
        that(
            lambda value: value == -1 or value >= 1,
            "top_k must be -1 (all tokens) or a positive integer",
            {"minimum": -1, "not": {"const": 0}},
        ),
    ),
    Field(
        "frequency_penalty",
        number("frequency_penalty is not a valid number"),
        within(-2, 2, "frequency_penalty out of range(-2.0, 2.0)"),
    ),
    Field(
        "presence_penalty",
        number("presence_penalty is not a valid number"),
        within(-2, 2, "presence_penalty out of range(-2.0, 2.0)"),
    ),
    Field("repetition_penalty", number("repetition_penalty is not a valid number")),
    Field("length_penalty", number("length_penalty is not a valid number")),
    Field("seed", integer("seed is not an integer"), within(0, UINT32_MAX, "seed out of range [0, 4294967295]")),
    Field("stop", inputs.stop_strings, *inputs.STOPS),
    Field("include_stop_str_in_output", boolean("include_stop_str_in_output accepts values true or false")),
    Field(
        "best_of",
        uint32("best_of is not an unsigned integer", "best_of is not an unsigned integer"),
        at_least(1, "best_of value should be greater than 0"),
    ),
    Field(
        "n",
        uint32("n is not an unsigned integer", "n is not an unsigned integer"),
        at_least(1, "n value should be greater than 0"),
    ),
    Field("ignore_eos", boolean("ignore_eos accepts values true or false")),
    Field("skip_special_tokens", boolean("skip_special_tokens is not a bool")),
    Field("num_assistant_tokens", *_unsigned("num_assistant_tokens")),
    Field(
        "assistant_confidence_threshold",
        number("assistant_confidence_threshold is not a valid number"),
        within(0, 1, "assistant_confidence_threshold out of range [0.0, 1.0]"),
    ),
    Field("max_ngram_size", *_unsigned("max_ngram_size")),
    Field("response_format", constraints.response_format),
    Field("lora_alphas", inputs.lora_alphas),
    Field("lora", inputs.lora),
)

_COMPLETIONS = (
    Field("prompt", inputs.prompts, inputs.PROMPTS, null=False, missing="prompt is missing"),
    Field("logprobs", integer("logprobs accepts integer values"), within(0, 20, "logprobs out of range [0, 20]")),
    Field("echo", boolean("echo accepts values true or false")),
)

_CHAT = (
    Field("messages", inputs.messages, null=False, missing="Messages missing in request"),
    Field(
        "max_completion_tokens",
        uint32("max_completion_tokens is not an unsigned integer", _COUNT_LIMIT.format("max_completion_tokens")),
    ),
    Field("logprobs", boolean("logprobs accepts values true or false")),
    Field(
        "top_logprobs",
        integer("top_logprobs accepts integer values"),
        within(0, 20, "top_logprobs out of range [0, 20]"),
    ),
    Field("tool_choice", tool_fields.ovms_tool_choice),
    Field("tools", tool_fields.ovms_tools),
    Field("parallel_tool_calls", boolean("parallel_tool_calls is not a bool")),
    Field("chat_template_kwargs", an_object("chat_template_kwargs must be an object")),
    Field("add_generation_prompt", boolean("add_generation_prompt is not a bool")),
    Field(
        "chat_template",
        text("chat_template is not a string"),
        that(lambda _: False, "chat_template is not allowed", {"not": {}}),
    ),
)

_COMMON_TOGETHER = (
    Together(
        "max_tokens",
        lambda v, limits: limits.max_tokens_limit is not None and v.get("max_tokens", 0) >= limits.max_tokens_limit,
        "max_tokens exceeds limit provided in graph config: {limits.max_tokens_limit}",
    ),
    Together(
        "include_stop_str_in_output",
        lambda v, _: bool(v.get("stream")) and v.get("include_stop_str_in_output") is False,
        "include_stop_str_in_output cannot be set to false if streaming is used",
    ),
    Together(
        "best_of",
        lambda v, limits: v.get("best_of", 1) >= limits.best_of_limit,
        "best_of exceeds limit provided in graph config: {limits.best_of_limit}",
    ),
    Together(
        "best_of",
        lambda v, _: "best_of" in v and bool(v.get("stream")),
        "best_of cannot be used in streaming mode",
    ),
    Together(
        "num_assistant_tokens",
        lambda v, limits: limits.assistance is not None and v.get("num_assistant_tokens") == 0,
        "num_assistant_tokens must be greater than 0 for {limits.assistance}",
    ),
    Together(
        "assistant_confidence_threshold",
        lambda v, limits: limits.assistance == PROMPT_LOOKUP and v.get("assistant_confidence_threshold", 0) != 0,
        "assistant_confidence_threshold is not supported for prompt lookup decoding",
    ),
    Together(
        "num_assistant_tokens",
        lambda v, limits: (
            limits.assistance is not None
            and "num_assistant_tokens" in v
            and v.get("assistant_confidence_threshold", 0) != 0
        ),
        "num_assistant_tokens and assistant_confidence_threshold are mutually exclusive; set only one",
    ),
    Together("n", lambda v, _: v.get("n", 1) > v.get("best_of", 1), "n value cannot be greater than best_of"),
    needs_adapters("lora_alphas"),
    needs_adapters("lora"),
)

_COMPLETIONS_TOGETHER = (
    *_COMMON_TOGETHER,
    Together(
        "max_tokens",
        lambda v, _: v.get("max_tokens") == 0 and not v.get("echo"),
        "max_tokens value should be greater than 0 unless echo is set",
    ),
)

_CHAT_TOGETHER = (
    *_COMMON_TOGETHER,
    Together(
        "max_completion_tokens",
        lambda v, limits: (
            limits.max_tokens_limit is not None and v.get("max_completion_tokens", 0) > limits.max_tokens_limit
        ),
        "max_completion_tokens exceeds limit provided in graph config: {limits.max_tokens_limit}",
    ),
    Together(
        "max_tokens",
        lambda v, _: v.get("max_completion_tokens", v.get("max_tokens")) == 0,
        "max_tokens value should be greater than 0",
    ),
    Together(
        "top_logprobs",
        lambda v, _: "top_logprobs" in v and not v.get("logprobs"),
        "top_logprobs requires logprobs to be true",
    ),
    tool_fields.NAMES_A_TOOL,
    tool_fields.ONE_CONSTRAINT,
)

COMPLETIONS = Table((*_COMMON, *_COMPLETIONS), _COMPLETIONS_TOGETHER)
CHAT = Table((*_COMMON, *_CHAT), _CHAT_TOGETHER)

DEFAULTS = SamplingDefaults(top_k=40, stop_string_in_streams=True, best_of_searches=True)
