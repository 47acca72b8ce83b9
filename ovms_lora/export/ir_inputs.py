"""The inputs of a stateful IR of a language model, for one whole text at a time.

Knows the names that optimum gives them; a model has those of them that its architecture uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def inputs_of(model: Any, token_ids: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of `model` (an IR, or one compiled) for the tokens of one text, from an empty state."""
    length = len(token_ids)
    values: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.array([token_ids], np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    names = {name for port in model.inputs for name in port.get_names()}
    return {name: value for name, value in values.items() if name in names}
