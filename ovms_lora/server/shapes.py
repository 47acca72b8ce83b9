"""The JSON of answers: completions, and the frame of all answers, whole and in chunks, in both dialects.

Owns the shapes. A shape turns a call and its choices into plain dictionaries; it knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ovms_lora import __version__
from ovms_lora.core.request import SequenceOutput
from ovms_lora.server.call import Call, Choice, Usage
from ovms_lora.server.logprobs import (
    Entry,
    TokenWriter,
    completion_logprobs,
    entries,
    prompt_entries,
    vllm_prompt_logprobs,
)

_FINGERPRINT = f"ovms-lora-{__version__}"


@dataclass(frozen=True, slots=True)
class ShapeStyle:
    """Where the dialects' answers differ: the object of a completion's chunk, and what OpenAI has and OVMS has not."""

    completion_chunk: str
    openai: bool


class ChoiceShape(Protocol):
    """What differs between the endpoints: object names and one choice, whole or as a delta."""

    id_prefix: str
    whole: str
    chunk: str

    def choice(self, choice: Choice) -> dict[str, Any]:
        """Return one finished choice."""

    def first_delta(self, choice: Choice) -> dict[str, Any] | None:
        """Return what opens a choice in a stream, if anything does."""

    def deltas(self, choice: Choice, output: SequenceOutput) -> list[dict[str, Any]]:
        """Return what one step brought to a choice: nothing while its text is held back."""


class CompletionShape:
    """`/completions`: text, after the prompt where `echo` is set."""

    id_prefix = "cmpl"
    whole = "text_completion"

    def __init__(self, call: Call, style: ShapeStyle, writer: TokenWriter) -> None:
        self.chunk = style.completion_chunk
        self._call = call
        self._openai = style.openai
        self._writer = writer

    def choice(self, choice: Choice) -> dict[str, Any]:
        """Return one finished choice."""
        text = "".join(choice.text)
        tokens = entries(choice.logprobs)
        if self._call.echo:
            text = choice.prompt.text + text
            tokens = prompt_entries(choice.prompt.token_ids, choice.prompt_logprobs) + tokens
        return self._written(choice, text, tokens)

    def first_delta(self, choice: Choice) -> dict[str, Any] | None:
        """Return the prompt where `echo` is set."""
        if not self._call.echo:
            return None
        tokens = prompt_entries(choice.prompt.token_ids, choice.prompt_logprobs)
        return self._written(choice, choice.prompt.text, tokens) | {"finish_reason": None}

    def deltas(self, choice: Choice, output: SequenceOutput) -> list[dict[str, Any]]:
        """Return what one step brought."""
        if not (output.text or output.finished or output.logprobs):
            return []
        return [self._written(choice, output.text, entries(output.logprobs))]

    def _written(self, choice: Choice, text: str, tokens: Sequence[Entry]) -> dict[str, Any]:
        logprobs = None
        if self._call.sampling.logprobs is not None:
            logprobs = completion_logprobs(tokens, self._writer, choice.text_offset)
            choice.text_offset += sum(map(len, logprobs["tokens"]))
        written: dict[str, Any] = {
            "finish_reason": choice.finish_reason,
            "index": choice.index,
            "logprobs": logprobs,
            "text": text,
        }
        if self._openai:
            written["stop_reason"] = choice.stop_reason
            if self._call.wants_prompt_logprobs and choice.prompt_logprobs is not None:
                written["prompt_logprobs"] = vllm_prompt_logprobs(choice.prompt_logprobs, self._writer)
        return written


class Answer:
    """Whole answers and chunks of one call."""

    def __init__(self, call: Call, shape: ChoiceShape, style: ShapeStyle) -> None:
        self._call = call
        self._shape = shape
        self._style = style

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""
        written = [self._shape.choice(choice) for choice in choices]
        return {**self._frame(written, self._shape.whole), "usage": self.usage(usage)}

    def chunk(self, choice: dict[str, Any], usage: Usage | None) -> dict[str, Any]:
        """Return one chunk of a stream; `usage` only where it was asked for on every chunk."""
        chunk = self._frame([choice], self._shape.chunk)
        if self._call.include_usage:
            chunk["usage"] = self.usage(usage) if usage else None
        return chunk

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk without choices that carries the usage."""
        return {**self._frame([], self._shape.chunk), "usage": self.usage(usage)}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the token numbers."""
        written: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if self._style.openai:
            written["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
        return written

    def _frame(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        frame = {
            "id": self._call.id,
            "choices": choices,
            "created": self._call.created,
            "model": self._call.model,
            "object": kind,
        }
        return {**frame, "system_fingerprint": _FINGERPRINT} if self._style.openai else frame
