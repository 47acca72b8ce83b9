"""What `LLM.generate` returns, with vLLM's names: one RequestOutput per prompt, one CompletionOutput per continuation.

Owns these shapes and how they are made of what the engine delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ovms_lora.core.request import SequenceOutput, TokenLogprob
from ovms_lora.offline.lora_request import LoRARequest

TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of one token; `rank` counts from 1 for the most probable one of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    `token_ids` hold every generated token, also those that `text` leaves out: the end of sequence, a stop string.
    `logprobs` has one map per token, from token id to log-probability; it and `cumulative_logprob`, the sum over the
    chosen tokens, are None unless `SamplingParams.logprobs` asks for them. `finish_reason` is "stop" or "length";
    `stop_reason` the stop string or token id, None for the end of sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        """Whether the continuation has come to its end."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt.

    `prompt` is None for a prompt of token ids. `prompt_logprobs` is None unless asked for; its first entry is None,
    since nothing predicts the first token. `num_cached_tokens` of the prompt were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None = None
    num_cached_tokens: int | None = None


def completion_output(
    steps: Sequence[SequenceOutput], token_text: TokenText, lora_request: LoRARequest | None, *, with_logprobs: bool
) -> CompletionOutput:
    """Return one continuation from all that the engine delivered of it, in order; there is at least one step."""
    last = steps[-1]
    chosen = [entry for step in steps for entry in step.logprobs]
    return CompletionOutput(
        index=last.index,
        text="".join(step.text for step in steps),
        token_ids=[token_id for step in steps for token_id in step.token_ids],
        cumulative_logprob=sum(entry.logprob for entry in chosen) if with_logprobs else None,
        logprobs=[_by_token_id(entry, token_text) for entry in chosen] if with_logprobs else None,
        finish_reason=last.finish_reason.value if last.finish_reason else None,
        stop_reason=last.stop_reason,
        lora_request=lora_request,
    )


def prompt_logprobs(
    entries: Sequence[TokenLogprob | None] | None, token_text: TokenText
) -> list[dict[int, Logprob] | None] | None:
    """Return the log-probabilities of a prompt's tokens, None where nobody asked for them."""
    if entries is None:
        return None
    return [_by_token_id(entry, token_text) if entry else None for entry in entries]


def _by_token_id(entry: TokenLogprob, token_text: TokenText) -> dict[int, Logprob]:
    """Return the token itself first, then the alternatives, best first."""
    ranked = {
        token_id: Logprob(logprob, rank, token_text(token_id))
        for rank, (token_id, logprob) in enumerate(entry.top, start=1)
    }
    own = ranked.get(entry.token_id) or Logprob(entry.logprob, entry.rank, token_text(entry.token_id))
    return {entry.token_id: own, **ranked}
