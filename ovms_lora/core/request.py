"""What the engine takes and gives: a request in tokens, and what each step adds to its sequences.

A request becomes `sampling.n` sequences, told apart by `index`. Texts become tokens, and JSON becomes these classes,
before the engine sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from ovms_lora.core.chat_template import TemplateSource
from ovms_lora.core.constraint import TokenConstraint
from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import Assistance


class HostAdapter(Protocol):
    """An adapter in host memory. A request holds it, so that it stays there until the request has ended."""

    @property
    def digest(self) -> str:
        """The digest of its content: its identity."""

    @property
    def max_rank(self) -> int:
        """The largest rank of its modules: what it takes of the total rank."""

    @property
    def chat_template(self) -> TemplateSource | None:
        """The chat template that came with it."""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter in a request's blend, and its strength.

    `alpha` multiplies the adapter's own PEFT scaling; 1.0 is the adapter exactly as trained.
    """

    adapter: HostAdapter
    alpha: float = 1.0

    @property
    def digest(self) -> str:
        """The adapter's identity."""
        return self.adapter.digest


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    `adapters` empty is the plain base model; several are summed: Σ αᵢ·scalingᵢ·BᵢAᵢ. `cache_salt` keeps the prefix
    blocks of different owners apart. `deadline` is in seconds of the engine's clock. `constraint` is what each of its
    sequences must match. Owners take turns, and `queue_share`, 0 … 1, is how much of the queue may hold requests of
    this `owner`. `assistance` says how its next tokens are guessed, where the model guesses at all.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    cache_salt: str = ""
    deadline: float | None = None
    constraint: TokenConstraint | None = None
    owner: str = ""
    queue_share: float = 1.0
    assistance: Assistance = field(default_factory=Assistance)


class FinishReason(StrEnum):
    """Why a sequence has ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of one token, with the `top` alternatives (token id, log-probability), best first.

    `rank` counts from 1 for the most probable token of the vocabulary; None where nobody has counted.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step added to one sequence of a request.

    `text` is empty while bytes of a character, or the start of a stop string, are still open. `token_ids` and
    `logprobs` belong to this step. `prompt_logprobs` comes once, with the first output; its first entry is None, since
    nothing predicts the first token. `stop_reason` is the stop string or token id that ended the sequence (None for
    EOS). `error` ends the request.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: OvmsLoraError | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing follows for this sequence."""
        return self.finish_reason is not None or self.error is not None

    def then(self, later: SequenceOutput) -> SequenceOutput:
        """Return this and what came after it as one output."""
        prompt_logprobs = self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs
        return replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=prompt_logprobs,
        )
