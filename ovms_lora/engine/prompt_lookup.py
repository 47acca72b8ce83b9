"""PromptLookup: guesses that a text goes on as it did where its last tokens stood before.

    … select the name of the │king│ who …   …   select the name of the │ ?
                              └──────┴─ the draft: what followed the last time

Summaries, extracts, edits of code and tables repeat what the prompt or the answer holds already. After Saxena, "Prompt
Lookup Decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.drafts import Draft
from ovms_lora.engine.sequence import Sequence

TokenArray = npt.NDArray[np.int32]

_LEAST_ROOM = 256
_LONGEST = 16  # tokens that are looked up at most
_SUREST = 8  # more tokens that are the same say nothing more


class PromptLookup:
    """A Drafter. The kind of a draft is how many tokens before it are the same in both places."""

    free = True
    seconds_per_token = 0.0

    def __init__(self, options: SpeculationOptions) -> None:
        self._options = options
        self._texts: dict[Sequence, _Text] = {}

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        """Look up the last tokens of each sequence; see Drafter."""
        found = {}
        for sequence, count in wanted.items():
            text = self._texts.get(sequence)
            if text is None:
                text = self._texts[sequence] = _Text()
            tokens = text.up_to_date(sequence.token_ids)
            shortest = min(self._options.min_ngram_size, _LONGEST)
            longest = sequence.request.assistance.max_ngram_size or self._options.max_ngram_size
            longest = min(longest, _LONGEST)
            if draft := look_up(tokens, count, shortest, longest):
                found[sequence] = draft
        return found

    def keep(self, sequences: Collection[Sequence]) -> None:
        """Forget all other sequences."""
        for sequence in self._texts.keys() - set(sequences):
            del self._texts[sequence]


class _Text:
    """The tokens of one sequence as an array that grows with it."""

    def __init__(self) -> None:
        self._array = np.empty(0, np.int32)
        self._length = 0

    def up_to_date(self, token_ids: list[int]) -> TokenArray:
        length = len(token_ids)
        if length > len(self._array):
            larger = np.empty(2 * length + _LEAST_ROOM, np.int32)
            larger[: self._length] = self._array[: self._length]
            self._array = larger
        self._array[self._length : length] = token_ids[self._length :]
        self._length = length
        return self._array[:length]


def look_up(tokens: TokenArray, count: int, shortest: int, longest: int) -> Draft | None:
    """Return the `count` tokens after the last place where the end of `tokens` stood before; None without one.

    Of the ends with `shortest` to `longest` tokens the longest is taken that is found. A place close to the end gives a
    draft that repeats itself, as text does that goes round in circles.
    """
    places = np.flatnonzero(tokens[:-1] == tokens[-1])
    matched = 1 if len(places) else 0
    while matched and matched < longest:
        further = places[places >= matched]
        further = further[tokens[further - matched] == tokens[-1 - matched]]
        if not len(further):
            break
        places, matched = further, matched + 1
    if matched < shortest:
        return None
    begin = int(places[-1]) + 1
    same = matched
    while same < min(_SUREST, begin) and tokens[begin - 1 - same] == tokens[-1 - same]:
        same += 1
    repeated = tokens[begin : begin + count].tolist()
    period = len(repeated)
    return Draft(tuple(repeated[at % period] for at in range(count)), same)
