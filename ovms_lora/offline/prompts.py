"""Prompts: all forms that `LLM.generate` and `LLM.chat` take, as tokens. Does not know whether a prompt fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ovms_lora.core.errors import ArgumentError, InvalidFieldError
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.tokenizer import Tokenizer

# A text, token ids, or {"prompt": text} or {"prompt_token_ids": token ids}.
PromptType = str | Sequence[int] | Mapping[str, Any]
# {"role": …, "content": text or a list of {"type": "text", "text": …}}, and whatever else the template knows.
Message = Mapping[str, Any]

_KEYS = frozenset({"prompt", "prompt_token_ids"})
_OWN_VARIABLES = frozenset({"self", "messages", "tools"})  # of a chat template; its other variables are the caller's


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens; `text` None when it was given so."""

    token_ids: tuple[int, ...]
    text: str | None = None


def read_prompts(prompts: PromptType | Sequence[PromptType], tokenizer: Tokenizer) -> list[Prompt]:
    """Return one prompt, or each of several, in tokens. Raises ArgumentError that names the prompt by its index."""
    return [_read(prompt, index, tokenizer) for index, prompt in enumerate(_several(prompts))]


def _several(prompts: PromptType | Sequence[PromptType]) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ArgumentError(f"prompts cannot be of type {type(prompts).__name__}")
    items = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def _read(prompt: Any, index: int, tokenizer: Tokenizer) -> Prompt:
    if isinstance(prompt, Mapping):
        if unknown := prompt.keys() - _KEYS:
            raise ArgumentError(f"prompt {index}: {min(map(str, unknown))!r} is not supported in a prompt")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif isinstance(prompt, str):
        text, token_ids = prompt, None
    else:
        text, token_ids = None, prompt
    if text is not None and not isinstance(text, str):
        raise ArgumentError(f"prompt {index}: a text is expected, not {type(text).__name__}")
    if token_ids is not None:
        return Prompt(_token_ids(token_ids, index), text)
    if text is None:
        raise ArgumentError(f"prompt {index}: neither a text nor token ids")
    return Prompt(tuple(tokenizer.encode(text)), text)


def _token_ids(value: Any, index: int) -> tuple[int, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        items = tuple(value)
        if all(isinstance(item, Integral) for item in items):
            return tuple(int(item) for item in items)
    raise ArgumentError(f"prompt {index}: a text or a list of token ids is expected")


def read_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> list[Prompt]:
    """Render one conversation, or each of several; return them in tokens.

    Raises ArgumentError, naming the conversation by its index, for what is no message or what the template refuses.
    """
    if template is None:
        raise ArgumentError("this model has no chat template", hint="use generate")
    if taken := _OWN_VARIABLES & variables.keys():
        raise ArgumentError(f"chat_template_kwargs cannot hold {min(taken)}")
    found = []
    for index, conversation in enumerate(_conversations(messages)):
        checked = _messages(conversation, index)
        try:
            text = template.render(checked, tools=tools, **variables)
        except InvalidFieldError as error:
            raise ArgumentError(f"conversation {index}: {error.message}") from error
        # The template has written the special tokens already.
        found.append(Prompt(tuple(tokenizer.encode(text, add_special_tokens=False)), text))
    return found


def _conversations(messages: Any) -> list[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise ArgumentError(f"messages cannot be of type {type(messages).__name__}")
    items = list(messages)
    return [items] if items and isinstance(items[0], Mapping) else items


def _messages(conversation: Any, index: int) -> list[dict[str, Any]]:
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise ArgumentError(f"conversation {index}: a list of messages is expected")
    return [_message(message, index) for message in conversation]


def _message(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ArgumentError(f"conversation {index}: every message is a mapping with a 'role'")
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return {**message, "content": content or ""}
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise ArgumentError(f"conversation {index}: content is a text, or a list of texts in parts")
    return {**message, "content": "\n".join(part["text"] for part in parts)}
