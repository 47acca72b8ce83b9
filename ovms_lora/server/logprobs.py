"""Log-probabilities as the two endpoints show them, and vLLM's `prompt_logprobs`.

Owns these three shapes; numbers come from the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ovms_lora.core.request import TokenLogprob


class TokenWriter(Protocol):
    """How tokens are written; a Tokenizer."""

    def token_text(self, token_id: int) -> str:
        """Return a token's text by itself."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes, which need not be whole characters."""


# JSON has no infinity; vLLM and OpenAI write this instead.
_LOWEST = -9999.0

# A token that nothing predicts, as the first of a prompt, has an id and no log-probability.
Entry = tuple[int, TokenLogprob | None]


def entries(logprobs: Iterable[TokenLogprob]) -> list[Entry]:
    """Return generated tokens with their log-probabilities."""
    return [(logprob.token_id, logprob) for logprob in logprobs]


def prompt_entries(token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None) -> list[Entry]:
    """Return prompt tokens with their log-probabilities, None where there is none."""
    return list(zip(token_ids, logprobs or [None] * len(token_ids), strict=True))


def completion_logprobs(tokens: Sequence[Entry], writer: TokenWriter, offset: int) -> dict[str, Any]:
    """Return the `logprobs` object of `/completions`; `offset` is where the first token begins, in characters."""
    texts = [writer.token_text(token_id) for token_id, _ in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) if entry else None for _, entry in tokens],
        "top_logprobs": [_top(entry, writer) if entry else None for _, entry in tokens],
        "text_offset": offsets,
    }


def _top(entry: TokenLogprob, writer: TokenWriter) -> dict[str, float]:
    # The first of two tokens with one text is the more probable one.
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(writer.token_text(token_id), _finite(logprob))
    return top


def chat_logprobs(tokens: Iterable[TokenLogprob], writer: TokenWriter) -> dict[str, Any]:
    """Return the `logprobs` object of `/chat/completions`."""
    content = [
        {
            **_chat_token(token.token_id, token.logprob, writer),
            "top_logprobs": [_chat_token(token_id, logprob, writer) for token_id, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content}


def _chat_token(token_id: int, logprob: float, writer: TokenWriter) -> dict[str, Any]:
    return {
        "token": writer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(writer.token_bytes(token_id)),
    }


def vllm_prompt_logprobs(
    logprobs: Sequence[TokenLogprob | None], writer: TokenWriter
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's `prompt_logprobs`: per token a map from token id to its log-probability."""
    return [_by_token_id(entry, writer) if entry else None for entry in logprobs]


def _by_token_id(entry: TokenLogprob, writer: TokenWriter) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for rank, (token_id, logprob) in enumerate(entry.top, start=1):
        found[str(token_id)] = {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": writer.token_text(token_id),
        }
    own = {
        "logprob": _finite(entry.logprob),
        "rank": entry.rank,
        "decoded_token": writer.token_text(entry.token_id),
    }
    found.setdefault(str(entry.token_id), own)
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
