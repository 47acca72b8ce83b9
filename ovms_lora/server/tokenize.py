"""The tokenize endpoints: OVMS's takes `text`, vLLM's takes `prompt` or `messages`.

Owns their fields and answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ovms_lora.server import inputs, tool_fields
from ovms_lora.server.bounds import Bound, at_most
from ovms_lora.server.fields import (
    Field,
    ModelLimits,
    Table,
    Together,
    an_object,
    at_least,
    boolean,
    integer,
    takes,
    text,
    that,
)
from ovms_lora.server.prompts import chat_prompts

if TYPE_CHECKING:
    from ovms_lora.core.request import AdapterUse
    from ovms_lora.engine.model import LoadedModel

_PADDING_SIDE = "padding_side should be either left or right"
_TEXT_LIST = {"type": "array", "minItems": 1, "items": {"type": "string"}, **at_most("maxItems", "prompts")}


@takes({"anyOf": [{"type": "string"}, _TEXT_LIST]})
def _texts(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("text should be string or array of strings")
    if not value:
        raise ValueError("text array should not be empty")
    return value


def _num_texts(value: str | list[str]) -> int:
    return 1 if isinstance(value, str) else len(value)


OVMS = Table(
    (
        Field(
            "text",
            _texts,
            Bound("prompts", "text array must have no more than {limit} strings", _num_texts),
            null=False,
            missing="text field is required",
        ),
        Field("add_special_tokens", boolean("add_special_tokens should be boolean"), null=False),
        Field(
            "max_length",
            integer("max_length should be integer"),
            at_least(1, "max_length should be greater than 0"),
            null=False,
        ),
        Field(
            "pad_to_max_length",
            boolean("pad_to_max_length should be boolean"),
            that(lambda value: value is False, "pad_to_max_length is not supported", {"enum": [False]}),
            null=False,
        ),
        Field(
            "padding_side",
            text("padding_side should be string, either left or right"),
            that(lambda value: value in ("left", "right"), _PADDING_SIDE, {"enum": ["left", "right"]}),
            null=False,
        ),
    ),
    (),
)

VLLM = Table(
    (
        Field("prompt", text("prompt must be a string")),
        Field("messages", inputs.messages),
        Field("add_special_tokens", boolean("add_special_tokens must be true or false")),
        Field("return_token_strs", boolean("return_token_strs must be true or false")),
        Field("add_generation_prompt", boolean("add_generation_prompt must be true or false")),
        Field("tools", tool_fields.vllm_tools),
        Field("chat_template_kwargs", an_object("chat_template_kwargs must be an object")),
    ),
    (
        Together(
            "prompt", lambda v, _: ("prompt" in v) == ("messages" in v), "exactly one of prompt and messages is needed"
        ),
    ),
)


def ovms_tokenize(
    document: Mapping[str, Any], limits: ModelLimits, model: LoadedModel, _: Sequence[AdapterUse]
) -> dict[str, Any]:
    """Return `{"tokens": …}`: a list for one text, a list of lists for several. Raises InvalidFieldError."""
    values = OVMS.read(document, limits)
    special, limit = values.get("add_special_tokens", True), values.get("max_length")

    def encode(content: str) -> list[int]:
        return model.tokenizer.encode(content, add_special_tokens=special)[:limit]

    texts = values["text"]
    return {"tokens": encode(texts) if isinstance(texts, str) else [encode(content) for content in texts]}


def vllm_tokenize(
    document: Mapping[str, Any], limits: ModelLimits, model: LoadedModel, uses: Sequence[AdapterUse]
) -> dict[str, Any]:
    """Return count, tokens and the model's length. Raises InvalidFieldError."""
    values = VLLM.read(document, limits)
    if "messages" in values:
        tokens = list(chat_prompts(values, model, uses)[0].token_ids)
    else:
        tokens = model.tokenizer.encode(values["prompt"], add_special_tokens=values.get("add_special_tokens", True))
    strings = [model.tokenizer.token_text(token) for token in tokens] if values.get("return_token_strs") else None
    return {
        "count": len(tokens),
        "max_model_len": model.engine.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }
