"""What an adapter is trained on: examples of two splits, and the LoRA that learns them.

Owns: the shape of one example and of one task.
Does not know: any particular task, or how training and evaluation run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, and the completion that the adapter should give before it ends the text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to train: its examples by (count, seed), its LoRA shape and its training budget.

    `held_out_examples` are the splits that it is judged by, under the names that the report gives them.
    `layers` restricts the LoRA to these decoder layers; None means all of them.
    """

    name: str
    train_examples: Callable[[int, int], list[Example]]
    held_out_examples: Mapping[str, Callable[[int, int], list[Example]]]
    rank: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None
    steps: int
    batch_size: int
    learning_rate: float
    longest_completion: int
