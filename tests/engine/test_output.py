"""From chosen tokens to text: characters and stop strings that are spread over tokens."""

from __future__ import annotations

from typing import Any

import pytest

from ovms_lora.core.errors import EngineError
from ovms_lora.core.request import FinishReason
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.sampler import Sampled
from ovms_lora.engine.sequence import Sequence
from tests.engine.harness import TOKENIZER, Answer, ScriptedRunner, generate, request
from tests.fakes import EOS


def written(script: str | bytes, **sampling: Any) -> Answer:
    """Return the answer of a model that writes the script, byte by byte."""
    content = script.encode() if isinstance(script, str) else script
    each = request(**{"max_tokens": 64, **sampling})
    return generate(each, runner=ScriptedRunner(content))["r"]


@pytest.mark.parametrize("text", ["naïve", "你好, world", "😀😀", "e\u0301", "👩‍👩‍👧"])
def test_characters_of_several_tokens_come_out_whole(text: str) -> None:
    answer = written(text)
    assert [piece for piece in answer.pieces if piece] == list(text)
    assert answer.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("stop", "text"), [("好", "你"), ("你好", ""), ("好,", "你"), ("😀 end", "你好, "), ("never", "你好, 😀 end.")]
)
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_of_characters_of_several_tokens(stop: str, text: str, include: bool) -> None:
    answer = written("你好, 😀 end.", stop=[stop], include_stop_str_in_output=include)
    hit = stop != "never"
    assert answer.text == text + stop * (include and hit)
    assert answer.stop_reason == (stop if hit else None)
    assert answer.finish_reason is FinishReason.STOP


def test_no_piece_of_a_stop_string_is_given_out_early() -> None:
    assert [piece for piece in written("one END two", stop=["END"]).pieces if piece] == list("one ")


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert written("a😀", max_tokens=3).text == "a�"
    assert written(b"a\xf0\x9f").text == "a�"


def test_a_replaced_character_can_be_the_stop_string() -> None:
    answer = written(b"a\xf0\x9f", stop=["�"])
    assert (answer.text, answer.stop_reason) == ("a", "�")


def test_a_stop_string_does_not_end_a_text_before_min_tokens() -> None:
    answer = written("xx, xx, xx", stop=["xx"], min_tokens=5)
    assert answer.text == "xx, "
    assert len(answer.token_ids) == 6
    assert written("abcdefgh", stop=["cd"], min_tokens=6).text == "abcdefgh"


def test_a_stop_string_that_is_complete_with_the_last_token_is_the_reason() -> None:
    answer = written("one two", stop=["two"], max_tokens=7)
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("one ", FinishReason.STOP, "two")


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    assert written("one two three", stop=["three", "two", "e t"]).stop_reason == "e t"


def test_a_failed_sequence_gives_its_error_and_nothing_else() -> None:
    processor = OutputProcessor(TOKENIZER, [EOS], 64)
    output = processor.failed(Sequence(request("x"), 2), EngineError("no"))
    assert (output.request_id, output.index, output.text, output.finish_reason) == ("x", 2, "", None)
    assert output.finished


def test_a_dropped_sequence_is_forgotten() -> None:
    processor = OutputProcessor(TOKENIZER, [EOS], 64)
    sequence = Sequence(request(), 0)
    processor.add(sequence)
    processor.drop(sequence)
    processor.drop(sequence)
    with pytest.raises(KeyError):
        processor.token(sequence, Sampled(97))
