"""What followed the last tokens before, by the plainest way of looking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import Assistance, SpeculationOptions
from ovms_lora.engine.drafts import Draft
from ovms_lora.engine.prompt_lookup import PromptLookup, look_up
from ovms_lora.engine.sequence import Sequence

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def plainly(tokens: list[int], count: int, shortest: int, longest: int) -> Draft | None:
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if size < len(tokens) and tokens[end - size : end] == tokens[-size:]:
                text = list(tokens)
                for _ in range(count):
                    text.append(text[end + len(text) - len(tokens)])
                same = size
                while same < min(8, end) and tokens[end - 1 - same] == tokens[-1 - same]:
                    same += 1
                return Draft(tuple(text[len(tokens) :]), same)
    return None


@given(tokens=TEXTS, count=st.integers(1, 9), shortest=st.integers(1, 3), more=st.integers(0, 4))
def test_the_last_place_of_the_longest_end_is_found(tokens: list[int], count: int, shortest: int, more: int) -> None:
    longest = shortest + more
    found = look_up(np.array(tokens, np.int32), count, shortest, longest)
    assert found == plainly(tokens, count, shortest, longest)


@given(tokens=TEXTS, pieces=st.lists(TEXTS, max_size=4))
def test_a_text_that_grows_is_looked_up_as_a_whole(tokens: list[int], pieces: list[list[int]]) -> None:
    sequence = Sequence(GenerationRequest("r", tuple(tokens), SamplingParams()), 0)
    lookup = PromptLookup(SpeculationOptions(max_ngram_size=3))
    for piece in [[], *pieces]:
        sequence.token_ids += piece
        expected = plainly(sequence.token_ids, 4, 1, 3)
        assert lookup.draft({sequence: 4}) == ({sequence: expected} if expected else {})


def test_a_request_says_how_much_is_looked_up() -> None:
    request = GenerationRequest("r", (1, 2, 3, 4, 9, 8, 3, 4, 7, 2, 3, 4), SamplingParams())
    lookup = PromptLookup(SpeculationOptions(max_ngram_size=1))
    for asked, kind, following in ((None, 2, 7), (2, 2, 7), (3, 3, 9), (10**9, 3, 9)):
        asking = replace(request, assistance=Assistance(max_ngram_size=asked))
        sequence = Sequence(asking, 0)
        assert lookup.draft({sequence: 1}) == {sequence: Draft((following,), kind)}


def test_texts_of_others_are_forgotten() -> None:
    request = GenerationRequest("r", (1, 1), SamplingParams())
    lookup, sequences = PromptLookup(SpeculationOptions()), [Sequence(request, index) for index in range(3)]
    lookup.draft(dict.fromkeys(sequences, 1))
    lookup.keep(sequences[:1])
    assert list(lookup._texts) == sequences[:1]
