"""A dialect: everything in which `/v3` and `/v1` differ, so that one handler serves both.

Owns the type; its two values stand in `v3` and `v1`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ovms_lora.server.call import Call, Prompt
from ovms_lora.server.errors import ErrorStyle
from ovms_lora.server.fields import ModelLimits, Schema, Table, Values
from ovms_lora.server.logprobs import TokenWriter
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.sampling import SamplingDefaults
from ovms_lora.server.shapes import ChoiceShape, ShapeStyle

if TYPE_CHECKING:
    from ovms_lora.core.request import AdapterUse
    from ovms_lora.engine.model import LoadedModel
    from ovms_lora.server.model_cards import ModelCard


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to ask for text: its fields, how prompts come out of them, how the answer looks.

    `max_tokens` is the default (None: until EOS or the model's length). `is_chat` tells of templates to render, which
    waits for another process, and of answers to be read for reasoning and tool calls.
    """

    id_prefix: str
    table: Table
    prompts: Callable[[Values, LoadedModel, Sequence[AdapterUse]], tuple[Prompt, ...]]
    shape: Callable[[Call, ShapeStyle, TokenWriter], ChoiceShape]
    max_tokens: int | None = None
    is_chat: bool = False


@dataclass(frozen=True, slots=True)
class AnswerTypes:
    """The types of a dialect's answers, of `answer_types`, and the statuses of failures that only it has."""

    completion: type
    completion_chunk: type
    chat: type
    chat_chunk: type
    tokens: type
    card: type
    cards: type
    error: type
    statuses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One dialect. `name` stands in metrics, `prefix` in paths.

    `check_content_type` raises for a Content-Type that is not JSON; `model_name` returns the model that a document
    names, or the one that it may leave out, and `head` is what it takes. `tokenize_fields` are read by `tokenize`.
    `card` is a model's description, `no_such_card` the answer when there is none; it may raise instead.
    """

    name: str
    prefix: str
    completions: Endpoint
    chat: Endpoint
    defaults: SamplingDefaults
    errors: ErrorStyle
    style: ShapeStyle
    check_content_type: Callable[[str], None]
    model_name: Callable[[Mapping[str, Any], ModelRegistry], str]
    head: Schema
    tokenize_fields: Table
    tokenize: Callable[[Mapping[str, Any], ModelLimits, LoadedModel, Sequence[AdapterUse]], dict[str, Any]]
    card: Callable[[ModelCard], dict[str, Any]]
    no_such_card: Callable[[str], Response]
    answers: AnswerTypes
