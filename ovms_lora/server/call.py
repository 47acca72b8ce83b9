"""Call: one client request as this server works on it, and what its sequences have brought so far.

Owns the counting and collecting; shapes of answers stand in `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ovms_lora.core.constraint import TokenConstraint
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.core.request import AdapterUse, GenerationRequest, SequenceOutput, TokenLogprob
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import Assistance
from ovms_lora.engine.output_parsers.parser import Grammar, plain
from ovms_lora.server.adapter_choice import AdapterChoice
from ovms_lora.server.constraints import AskedConstraint
from ovms_lora.server.tenants import PUBLIC, Tenant

if TYPE_CHECKING:
    from ovms_lora.server.sampling import TokenBudget


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and its text as `echo` gives it back."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One client request: prompts to continue, `sampling.n` times each, and how to answer.

    With more `candidates` than that, so many are sampled for each prompt, and the answer has the best. `constraint` is
    what the text must match, `grammar` how reasoning and tool calls are told from content in it, `assistance` how the
    engine may guess it.
    """

    id: str
    created: int
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    candidates: int
    budget: TokenBudget
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    wants_prompt_logprobs: bool = False
    cache_salt: str = ""
    tenant: Tenant = PUBLIC
    adapters: AdapterChoice = field(default_factory=AdapterChoice)
    constraint: AskedConstraint | None = None
    grammar: Grammar = plain
    assistance: Assistance = field(default_factory=Assistance)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def requests(
        self,
        max_model_len: int,
        adapters: tuple[AdapterUse, ...],
        deadline: float,
        constraint: TokenConstraint | None = None,
    ) -> list[GenerationRequest]:
        """Return one engine request per prompt. Raises InvalidFieldError where the token numbers do not fit."""
        return [
            GenerationRequest(
                request_id=f"{self.id}-{number}",
                prompt_token_ids=prompt.token_ids,
                sampling=self._sampling_for(prompt, max_model_len),
                adapters=adapters,
                cache_salt=self.tenant.salt(self.cache_salt),
                deadline=deadline,
                constraint=constraint,
                owner=self.tenant.name,
                queue_share=self.tenant.queue_share,
                assistance=self.assistance,
            )
            for number, prompt in enumerate(self.prompts)
        ]

    def _sampling_for(self, prompt: Prompt, max_model_len: int) -> SamplingParams:
        max_tokens = self.budget.for_prompt(len(prompt.token_ids), max_model_len)
        logprobs = self.sampling.logprobs
        if logprobs is None and self.candidates > self.sampling.n:
            logprobs = 0  # to compare the candidates
        try:
            return replace(self.sampling, max_tokens=max_tokens, n=self.candidates, logprobs=logprobs)
        except ValueError as error:
            raise InvalidFieldError(str(error), param="min_tokens") from error


@dataclass(slots=True)
class Choice:
    """One sequence of a call as it grows."""

    index: int
    prompt: Prompt
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    text_offset: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    started: bool = False

    @property
    def mean_logprob(self) -> float:
        """The log-probability per token, by which OpenAI's `best_of` compares."""
        return sum(entry.logprob for entry in self.logprobs) / max(len(self.logprobs), 1)

    def add(self, output: SequenceOutput) -> None:
        """Take what one step brought."""
        self.text.append(output.text)
        self.logprobs.extend(output.logprobs)
        self.completion_tokens += len(output.token_ids)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """Token numbers of a call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Choices:
    """All sequences of a call: sequence i of prompt p, which has n of them, is choice p · n + i."""

    def __init__(self, call: Call) -> None:
        n = call.candidates
        self._prompts = call.prompts
        self._n = n
        self._answered = call.sampling.n
        self._first = {f"{call.id}-{number}": number * n for number in range(len(call.prompts))}
        self.all = [Choice(index, call.prompts[index // n]) for index in range(n * len(call.prompts))]

    def of(self, output: SequenceOutput) -> Choice:
        """Return the choice that an output belongs to."""
        return self.all[self._first[output.request_id] + output.index]

    def best(self) -> list[Choice]:
        """Return the choices to answer with: all, or the best of each prompt, best first, with the places they take."""
        if self._answered == self._n:
            return self.all
        found: list[Choice] = []
        for first in range(0, len(self.all), self._n):
            ranked = sorted(self.all[first : first + self._n], key=lambda choice: -choice.mean_logprob)
            found += ranked[: self._answered]
        return [replace(choice, index=index) for index, choice in enumerate(found)]

    def usage(self) -> Usage:
        """Return the token numbers so far; a prompt counts once, however many sequences continue it."""
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self._prompts),
            completion_tokens=sum(choice.completion_tokens for choice in self.all),
            cached_tokens=sum(choice.cached_tokens for choice in self.all[:: self._n]),
        )
