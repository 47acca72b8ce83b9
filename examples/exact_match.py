"""Evaluation: the share of held-out examples whose greedy completion is the expected one, to the letter.

Owns: batched greedy generation and the comparison.
Does not know: tasks, training or adapters; it judges whatever model it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from task import Example

_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One example, and what the model gave instead of its completion."""

    example: Example
    given: str


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Return the greedy completion of each prompt with its end-of-text token, if it came to one."""
    tokenizer.padding_side = "left"
    completions: list[str] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        batch = tokenizer(list(prompts[start : start + _BATCH_SIZE]), return_tensors="pt", padding=True)
        with torch.no_grad():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        rows = output[:, batch["input_ids"].shape[1] :].tolist()
        completions += [tokenizer.decode(_until_end(row, tokenizer.eos_token_id)) for row in rows]
    return completions


def mismatches(model: Any, tokenizer: Any, examples: Sequence[Example], *, max_new_tokens: int) -> list[Mismatch]:
    """Return the examples that the model does not complete exactly, ending by itself."""
    given = complete(model, tokenizer, [example.prompt for example in examples], max_new_tokens=max_new_tokens)
    return [
        Mismatch(example, text)
        for example, text in zip(examples, given, strict=True)
        if text != example.completion + tokenizer.eos_token
    ]


def _until_end(token_ids: list[int], end: int) -> list[int]:
    return token_ids[: token_ids.index(end) + 1] if end in token_ids else token_ids
