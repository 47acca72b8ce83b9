"""The JSON of chat completions: the assistant's message, whole and in deltas, in both dialects.

The text of the model is read by the call's grammar, so that reasoning and tool calls have fields of their own. A whole
message is read like a stream that comes in one piece: the two say the same.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any

from ovms_lora.core.request import FinishReason, SequenceOutput, TokenLogprob
from ovms_lora.engine.output_parsers.deltas import Arguments, CallStart, Content, Delta, Reasoning
from ovms_lora.engine.output_parsers.parser import OutputParser
from ovms_lora.server.call import Call, Choice
from ovms_lora.server.logprobs import TokenWriter, chat_logprobs
from ovms_lora.server.shapes import ShapeStyle

# Nine letters and digits, as OVMS: the templates of Mistral's models accept nothing else.
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9


class _Message:
    """One choice's message as it grows."""

    def __init__(self, call: Call) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self._parser = OutputParser(call.grammar)

    def add(self, text: str, *, finished: bool) -> list[dict[str, Any]]:
        """Take more text; return it as deltas."""
        deltas = self._parser.feed(text) if text else []
        if finished:
            deltas += self._parser.finish()
        return [self._added(delta) for delta in deltas]

    def _added(self, delta: Delta) -> dict[str, Any]:
        match delta:
            case Content(text):
                self.content += text
                return {"content": text}
            case Reasoning(text):
                self.reasoning += text
                return {"reasoning_content": text}
            case CallStart(name):
                call_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
                function = {"name": name, "arguments": ""}
                self.calls.append({"id": call_id, "type": "function", "function": function})
                return {"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1], "function": {**function}}]}
            case Arguments(text):
                self.calls[-1]["function"]["arguments"] += text
                return {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": text}}]}


class ChatShape:
    """`/chat/completions`: a message of the assistant."""

    id_prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, call: Call, style: ShapeStyle, writer: TokenWriter) -> None:
        self._call = call
        self._openai = style.openai
        self._writer = writer
        self._streamed: dict[int, _Message] = {}

    def choice(self, choice: Choice) -> dict[str, Any]:
        """Return one finished choice."""
        message = _Message(self._call)
        message.add("".join(choice.text), finished=True)
        return self._written(choice, choice.logprobs, {"message": self._whole(message)}, _reason(choice, message))

    def first_delta(self, choice: Choice) -> dict[str, Any] | None:
        """Return the role."""
        delta = {"role": "assistant", "content": "" if self._openai else None}
        opening = {"finish_reason": None, "index": choice.index, "logprobs": None}
        return {**opening, "delta": delta}

    def deltas(self, choice: Choice, output: SequenceOutput) -> list[dict[str, Any]]:
        """Return what one step brought; the last delta of a step carries its log-probabilities and the end."""
        message = self._streamed.setdefault(choice.index, _Message(self._call))
        deltas = message.add(output.text, finished=output.finished)
        if not deltas and (output.finished or output.logprobs):
            deltas = [{}]
        last = len(deltas) - 1
        return [
            self._written(
                choice,
                output.logprobs if number == last else None,
                {"delta": delta},
                _reason(choice, message) if number == last else None,
            )
            for number, delta in enumerate(deltas)
        ]

    def _whole(self, message: _Message) -> dict[str, Any]:
        written: dict[str, Any] = {"content": message.content, "role": "assistant"}
        if message.reasoning:
            written["reasoning_content"] = message.reasoning
        if not self._openai:
            return {**written, "tool_calls": message.calls}
        if not message.calls:
            return {**written, "refusal": None}
        return {**written, "content": message.content or None, "refusal": None, "tool_calls": message.calls}

    def _written(
        self, choice: Choice, tokens: Sequence[TokenLogprob] | None, content: dict[str, Any], finish_reason: str | None
    ) -> dict[str, Any]:
        asked = self._call.sampling.logprobs is not None
        written = {
            "finish_reason": finish_reason,
            "index": choice.index,
            "logprobs": chat_logprobs(tokens, self._writer) if asked and tokens is not None else None,
            **content,
        }
        if self._openai:
            written["stop_reason"] = choice.stop_reason if finish_reason else None
        return written


def _reason(choice: Choice, message: _Message) -> str | None:
    called = message.calls and choice.finish_reason == FinishReason.STOP
    return "tool_calls" if called else choice.finish_reason
