"""Job and Answer: what every engine is asked and gives, and the interface that it is asked through.

The work is the same for all: token ids in, a fixed number of greedy tokens out, the end-of-sequence token ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """Rows that are asked at once: `prompts` as token ids, an adapter or None for each, `tokens` to generate."""

    prompts: list[list[int]]
    adapters: list[str | None]
    tokens: int

    def groups(self) -> dict[str | None, list[int]]:
        """Return the rows of each adapter, for engines that cannot mix them."""
        found: dict[str | None, list[int]] = {}
        for row, adapter in enumerate(self.adapters):
            found.setdefault(adapter, []).append(row)
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated tokens of each row, and the seconds that all of it took."""

    tokens: list[list[int]]
    seconds: float

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is made of: a model folder of ours, PEFT folders by name, and a folder for files of its own.

    Engines that read no OpenVINO IR take the Hugging Face folder that it was exported from, `source`, and the GGUF file
    of its tokenizer, `vocabulary`.
    """

    model: Path
    adapters: Mapping[str, Path]
    work: Path
    max_batch: int
    source: Path | None = None
    vocabulary: Path | None = None


class Engine(Protocol):
    """An engine that is loaded and warm."""

    def run(self, job: Job) -> Answer:
        """Do a job. An engine that cannot mix adapters does its groups one after another."""


Start = Callable[[Setup], Engine]


def in_groups(job: Job, run: Callable[[str | None, Sequence[list[int]]], list[list[int]]]) -> list[list[int]]:
    """Run the rows of each adapter together, one adapter after another; return the tokens in the order of the rows."""
    tokens: list[list[int]] = [[] for _ in job.prompts]
    for adapter, rows in job.groups().items():
        for row, its_tokens in zip(rows, run(adapter, [job.prompts[row] for row in rows]), strict=True):
            tokens[row] = its_tokens
    return tokens
