"""The JSON of answers as types, for the OpenAPI document: per dialect what differs, the rest once.

Owns what clients may rely on. `shapes`, `model_cards` and their like write the answers; the tests hold every kind of
answer against these types. A type may leave out members that an answer has beside.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

# pydantic reads typing's own TypedDict only from Python 3.12 on.
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class OvmsError(TypedDict):
    """What went wrong, in one string."""

    error: str


class OpenAIErrorDetail(TypedDict):
    """What went wrong; `param` names the field, `code` repeats the status or says how an adapter is bad."""

    message: str
    type: str
    param: str | None
    code: int | str


class OpenAIError(TypedDict):
    """What went wrong, as OpenAI's clients read it."""

    error: OpenAIErrorDetail


class Usage(TypedDict):
    """Token numbers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptTokensDetails(TypedDict):
    """How many tokens of the prompt came from the prefix cache."""

    cached_tokens: int


class UsageV1(Usage):
    """Token numbers, and what was cached."""

    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completion, token by token; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AlternativeToken(TypedDict):
    """One token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(AlternativeToken):
    """A chosen token, and the best ones at its place."""

    top_logprobs: list[AlternativeToken]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a message."""

    content: list[ChatToken]


class FunctionCall(TypedDict):
    """A function and its arguments: JSON, as far as the model wrote it well."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the assistant asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(TypedDict):
    """The name of a function at the beginning of its call, then its arguments piece by piece."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What one event adds to the call with this index; `id` and `type` stand in its first one."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class Message(TypedDict):
    """A message of the assistant; `content` is null where there are only calls, on `/v1`."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    refusal: NotRequired[None]


class Delta(TypedDict):
    """What one event adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class _Choice(TypedDict):
    index: int
    stop_reason: NotRequired[str | int | None]


class CompletionChoice(_Choice):
    """One continuation; `stop_reason` and `prompt_logprobs` on `/v1` only."""

    finish_reason: FinishReason | None
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: NotRequired[list[dict[str, dict[str, Any]] | None]]


class ChatChoice(_Choice):
    """One message; `stop_reason` on `/v1` only."""

    finish_reason: ChatFinishReason | None
    message: Message
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice):
    """What one event adds to one message; `stop_reason` on `/v1` only."""

    finish_reason: ChatFinishReason | None
    delta: Delta
    logprobs: ChatLogprobs | None


class _Answer(TypedDict):
    id: str
    created: int
    model: str


class _AnswerV1(_Answer):
    system_fingerprint: str


class CompletionV3(_Answer):
    """A whole completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkV3(_Answer):
    """One event of a completion. `usage` stands there when asked for; the last chunk then has no choices."""

    object: Literal["text_completion.chunk"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class CompletionV1(_AnswerV1):
    """A whole completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageV1


class CompletionChunkV1(_AnswerV1):
    """One event of a completion. `usage` stands there when asked for; the last chunk then has no choices."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[UsageV1 | None]


class ChatV3(_Answer):
    """A whole chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkV3(_Answer):
    """One event of a chat completion. `usage` stands there when asked for; the last chunk then has no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class ChatV1(_AnswerV1):
    """A whole chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageV1


class ChatChunkV1(_AnswerV1):
    """One event of a chat completion. `usage` stands there when asked for; the last chunk then has no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageV1 | None]


class TokensV3(TypedDict):
    """Token ids: a list for one text, a list of lists for several."""

    tokens: list[int] | list[list[int]]


class TokensV1(TypedDict):
    """Token ids of one text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class _Card(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class CardV3(_Card):
    """A model; an adapter also says where it lies and what its base is."""

    root: NotRequired[str]
    parent: NotRequired[str]


class CardV1(_Card):
    """A model (`parent` null), or an adapter or composite of one."""

    root: str
    parent: str | None
    max_model_len: int


class CardsV3(TypedDict):
    """Models first, then adapters and composites."""

    object: Literal["list"]
    data: list[CardV3]


class CardsV1(TypedDict):
    """Models first, then adapters and composites."""

    object: Literal["list"]
    data: list[CardV1]
