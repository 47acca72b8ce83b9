"""Stop strings end a text at the same place however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.engine.stop_strings import StopStrings


def feed(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """Return the text that comes out, flushed at the end, and the stop string that ended it."""
    watcher, text = StopStrings(stops, include=include), ""
    for piece in pieces:
        cut = watcher.add(piece)
        text += cut.text
        if cut.stopped_by is not None:
            return text, cut.stopped_by
    return text + watcher.flush(), None


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    return draw(st.lists(st.text("ab€ ", max_size=4), max_size=12))


@given(pieces=cut_texts(), stop=st.text("ab€", min_size=1, max_size=5), include=st.booleans())
@settings(max_examples=300)
def test_one_stop_string_ends_the_text_where_it_first_stands(pieces: list[str], stop: str, include: bool) -> None:
    whole = "".join(pieces)
    at = whole.find(stop)
    expected = (whole, None) if at < 0 else (whole[: at + len(stop) * include], stop)
    assert feed(pieces, [stop], include=include) == expected


@given(pieces=cut_texts(), stops=st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=300)
def test_no_stop_string_ever_comes_out(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    text, stopped_by = feed(pieces, stops)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    if stopped_by is None:
        assert text == whole
    else:
        assert whole[len(text) :].startswith(stopped_by)


@given(pieces=cut_texts(), stop=st.text("ab€", min_size=1, max_size=5))
@settings(max_examples=200)
def test_no_more_is_held_back_than_could_become_a_stop_string(pieces: list[str], stop: str) -> None:
    watcher, seen, given_out = StopStrings([stop]), "", ""
    for piece in pieces:
        cut = watcher.add(piece)
        seen, given_out = seen + piece, given_out + cut.text
        if cut.stopped_by:
            return
        assert stop.startswith(seen[len(given_out) :])


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["say ", "STOP now"], ["STOP"], ("say ", "STOP")),
        (["S", "T", "O", "P", "!"], ["STOP"], ("", "STOP")),
        (["ST", "ST", "OP"], ["STOP"], ("ST", "STOP")),
        (["aab", "aac"], ["aabaac"], ("", "aabaac")),
        (["one two"], ["two", "one"], ("", "one")),
        (["abc"], ["abc", "ab"], ("", "ab")),
        (["STO"], ["STOP"], ("STO", None)),
        (["", ""], ["x"], ("", None)),
        (["text"], [], ("text", None)),
    ],
)
def test_examples(pieces: list[str], stops: list[str], expected: tuple[str, str | None]) -> None:
    assert feed(pieces, stops) == expected


def test_what_follows_an_included_stop_string_is_cut_off() -> None:
    assert feed(["one STOP two"], ["STOP"], include=True) == ("one STOP", "STOP")
