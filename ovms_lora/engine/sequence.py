"""Sequence: one run of tokens that grows, with its blocks, its place in the queues and its own random numbers.

    WAITING ──admit──► RUNNING ──finish──► FINISHED
       ▲                  │
       └────preempt───────┘            (WAITING ──finish──► FINISHED when cancelled before it ran)

A preempted sequence keeps its tokens and gives up its blocks: it computes them anew when it is admitted again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ovms_lora.core.constraint import TokenMatcher
from ovms_lora.core.request import GenerationRequest
from ovms_lora.engine.block_pool import PrefixKey, prefix_key, prefix_root
from ovms_lora.engine.lora_rows import SequenceTiles


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_NEXT: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
    SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.FINISHED}),
    SequenceStatus.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request's prompt.

    `token_ids` are prompt (`num_prompt` of them) and output together; the first `num_computed` of them have keys and
    values in `blocks`.
    `num_cached` of the prompt's were found in the cache when the sequence was first admitted; None before that.
    `tiles` are those of its adapters while it runs; None for the plain base.
    `matcher` follows the request's constraint along the output; it has no part in a preemption.
    `had_turn` says that it has been admitted before; `bypassed` counts younger ones that were admitted before it,
    because its adapters had no room.
    `parked` says that there is nothing to compute: its next token depends on other beams that are not as far yet.
    """

    request: GenerationRequest
    index: int
    token_ids: list[int] = field(default_factory=list)
    num_prompt: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_cached: int | None = None
    blocks: list[int] = field(default_factory=list)
    tiles: SequenceTiles | None = None
    arrival: int = 0
    had_turn: bool = False
    bypassed: int = 0
    matcher: TokenMatcher | None = None
    parked: bool = False
    _keys: list[PrefixKey] = field(default_factory=list)
    _rng: np.random.Generator | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        if self.matcher is None and self.request.constraint is not None:
            self.matcher = self.request.constraint.matcher()

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def rng(self) -> np.random.Generator:
        """The sequence's own random numbers: with a seed they depend on the seed and `index`, on nothing else."""
        if self._rng is None:
            seed = self.request.sampling.seed
            self._rng = np.random.default_rng(None if seed is None else [seed, self.index])
        return self._rng

    def fork(self) -> Sequence:
        """Return a sequence of the same request with the same tokens and place in the queue; it holds no blocks yet."""
        matcher = self.matcher.fork() if self.matcher else None
        child = Sequence(self.request, self.index, arrival=self.arrival, num_cached=self.num_cached, matcher=matcher)
        child.token_ids = list(self.token_ids)
        child._keys = list(self._keys)
        return child

    def move_to(self, status: SequenceStatus) -> None:
        """Change the status along the table above."""
        assert status in _NEXT[self.status], f"{self.status} does not lead to {status}"
        self.status = status

    def prefix_keys(self, count: int, block_size: int) -> list[PrefixKey]:
        """Return the keys of the first `count` full blocks. Tokens never change, so neither do keys once made."""
        keys = self._keys
        while len(keys) < count:
            start = len(keys) * block_size
            parent = keys[-1] if keys else self._root()
            keys.append(prefix_key(parent, self.token_ids[start : start + block_size]))
        return keys[:count]

    def _root(self) -> PrefixKey:
        adapters = [f"{use.digest}*{float(use.alpha).hex()}" for use in self.request.adapters]
        return prefix_root(self.request.cache_salt, *adapters)


@dataclass(frozen=True, slots=True)
class Fork:
    """A sequence that goes on from another one: the child has the parent's tokens and one more."""

    parent: Sequence
    child: Sequence
