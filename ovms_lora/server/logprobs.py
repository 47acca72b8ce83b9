"""Log-probabilities as the two endpoints show them, and vLLM's `prompt_logprobs`.

Owns these three shapes; numbers come from the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ovms_lora.core.request import TokenLogprob

TokenText = Callable[[int], str]

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


def completion_logprobs(tokens: Sequence[Entry], token_text: TokenText, offset: int) -> dict[str, Any]:
    """Return the `logprobs` object of `/completions`; `offset` is where the first token begins, in characters."""
    texts = [token_text(token_id) for token_id, _ in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) if entry else None for _, entry in tokens],
        "top_logprobs": [_top(entry, token_text) if entry else None for _, entry in tokens],
        "text_offset": offsets,
    }


def _top(entry: TokenLogprob, token_text: TokenText) -> dict[str, float]:
    # The first of two tokens with one text is the more probable one.
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(token_text(token_id), _finite(logprob))
    return top


def chat_logprobs(tokens: Iterable[TokenLogprob], token_text: TokenText) -> dict[str, Any]:
    """Return the `logprobs` object of `/chat/completions`."""
    content = [
        {
            **_chat_token(token.token_id, token.logprob, token_text),
            "top_logprobs": [_chat_token(token_id, logprob, token_text) for token_id, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content}


def _chat_token(token_id: int, logprob: float, token_text: TokenText) -> dict[str, Any]:
    text = token_text(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def vllm_prompt_logprobs(
    logprobs: Sequence[TokenLogprob | None], token_text: TokenText
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's `prompt_logprobs`: per token a map from token id to its log-probability."""
    return [_by_token_id(entry, token_text) if entry else None for entry in logprobs]


def _by_token_id(entry: TokenLogprob, token_text: TokenText) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for rank, (token_id, logprob) in enumerate(entry.top, start=1):
        found[str(token_id)] = {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": token_text(token_id),
        }
    own = {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": token_text(entry.token_id)}
    found.setdefault(str(entry.token_id), own)
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
