"""Each format is read as its models write it; what is not a call is content; how the text is cut changes nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.output_parsers import forced
from ovms_lora.engine.output_parsers.deltas import Arguments, CallStart, Content
from ovms_lora.engine.output_parsers.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    answer_grammar,
    check_parser_names,
    visible_markers,
)
from ovms_lora.engine.output_parsers.parser import Grammar, OutputParser
from tests.engine.output_parsers.parsed import WEATHER, Parsed, parse

PARIS = ("weather", '{"city": "Paris"}')
ROME = ("weather", '{"city": "Rome"}')
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
CALL_2 = '{"name": "weather", "arguments": {"city": "Rome"}}'
ODD = '{"name": "f", "arguments": {"q": "a \\"}]{[ </tool_call> \\\\", "n": {"é": ["🐍", {}]}}}'
ODD_CALL = ("f", '{"q": "a \\"}]{[ </tool_call> \\\\", "n": {"é": ["🐍", {}]}}')


def grammar_of(name: str) -> Grammar:
    return answer_grammar(name, "", tools=[WEATHER], prompt="")


def parsed(name: str, text: str) -> Parsed:
    """Parse a text whole, character by character and in threes: the three agree."""
    whole = parse(grammar_of(name), text)
    assert parse(grammar_of(name), *text) == whole
    assert parse(grammar_of(name), *(text[i : i + 3] for i in range(0, len(text), 3))) == whole
    return whole


CALLS = [
    ("hermes3", f"<tool_call>{CALL}</tool_call>", "", [PARIS]),
    ("hermes3", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL_2}\n</tool_call>\n", "", [PARIS, ROME]),
    ("hermes3", f"I look.\n\n<tool_call>{CALL}</tool_call>", "I look.", [PARIS]),
    ("hermes3", f"<tool_call>{CALL}</tool_call> \nDone.", "Done.", [PARIS]),
    ("hermes3", f"<tool_call>{CALL}", "", [PARIS]),
    ("hermes3", f"<tool_call>{CALL[:-1]}</tool_call>", "", [PARIS]),
    ("hermes3", f"<tool_call>{CALL}}}</tool_call>", "}</tool_call>", [PARIS]),
    ("hermes3", f"<tool_call>{ODD}</tool_call>", "", [ODD_CALL]),
    ("hermes3", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("hermes3", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes3", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes3", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes3", '<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": [1]}</tool_call>', "", [("f", "{}")]),
    ("hermes3", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama3", f"<|python_tag|>{CALL}", "", [PARIS]),
    ("llama3", f"\n {CALL}; {CALL_2}\n", "", [PARIS, ROME]),
    ("llama3", f"{CALL} and so on", "and so on", [PARIS]),
    ("llama3", f"I look. <|python_tag|>{CALL};{CALL_2}", "I look.", [PARIS, ROME]),
    ("mistral", f"[TOOL_CALLS][{CALL}]", "", [PARIS]),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL_2}]", "", [PARIS, ROME]),
    ("mistral", f"[{CALL},{CALL_2}]", "", [PARIS, ROME]),
    ("mistral", f"I look.[TOOL_CALLS][{CALL}]", "I look.", [PARIS]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]weather{"city": "Rome"}', "", [PARIS, ROME]),
    ("devstral", '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("mistral", '[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("phi4", f"functools[{CALL}]", "", [PARIS]),
    ("phi4", f"I look. functools[{CALL}, {CALL_2}] Done.", "I look.Done.", [PARIS, ROME]),
    (
        "gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "",
        [PARIS],
    ),
    ("gptoss", "<|channel|>final<|message|>It rains.<|return|>", "It rains.", []),
    (
        "gptoss",
        "<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}',
        "I look.",
        [ROME],
    ),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CALLS)
def test_calls_are_found(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = parsed(name, text)
    assert (found.content, found.calls) == (content, calls)


def coder(*parameters: tuple[str, str]) -> str:
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function=weather>\n{written}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("key", "value", "json_value"),
    [
        ("city", "Paris", "Paris"),
        ("city", "12", "12"),
        ("city", '{"a"}\n"é"', '{"a"}\n"é"'),
        ("city", "", ""),
        ("days", "3", 3),
        ("days", "three", "three"),
        ("metric", "True", True),
        ("metric", "false", False),
        ("tags", '["a", 1]', ["a", 1]),
        ("note", "null", None),
        ("note", "5", "5"),
        ("size", "None", None),
        ("size", "4", 4),
        ("unknown", "4", "4"),
    ],
)
def test_qwen3coder_gives_values_the_types_of_the_schema(key: str, value: str, json_value: object) -> None:
    ((name, arguments),) = parsed("qwen3coder", coder((key, value))).calls
    assert (name, json.loads(arguments)) == ("weather", {key: json_value})


def test_qwen3coder_reads_several_parameters_and_calls() -> None:
    one, other = coder(("city", "Paris"), ("days", "2")), coder()
    found = parsed("qwen3coder", f"I look.\n{one}\n{other}\nDone.")
    assert found.content == "I look.Done."
    assert found.calls == [("weather", '{"city": "Paris", "days": 2}'), ("weather", "{}")]


def test_qwen3coder_reads_a_function_without_the_outer_tag() -> None:
    text = "<function=weather><parameter=city>Paris</parameter></function>"
    assert parsed("qwen3coder", text).calls == [PARIS]


def test_qwen3coder_leaves_a_cut_call_open() -> None:
    text = coder(("city", "Paris"), ("days", "2")).partition("2\n")[0]
    assert parsed("qwen3coder", text).calls == [("weather", '{"city": "Paris"')]


NO_CALLS = [
    ("hermes3", "Hello <tool_ca"),
    ("hermes3", " \n"),
    ("hermes3", "Use a <tool_call> tag."),
    ("hermes3", "<tool_call>not json</tool_call>"),
    ("hermes3", "<tool_call>"),
    ("hermes3", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes3", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes3", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes3", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes3", '<tool_call>{"name": "f", "arguments": "no"}</tool_call>'),
    ("hermes3", '<tool_call>{"name": "f", '),
    ("hermes3", '<tool_call>{"name" "f"}</tool_call>'),
    ("hermes3", "<tool_call>[1]</tool_call>"),
    ("hermes3", "<tool_call>{" + '"a": {' * 3),
    ("hermes3", f"<tool_call>{{1: {'[' * 100_000}"),
    ("hermes3", '<tool_call>{"a": ' + "1" * 5000 + "}"),
    ("llama3", '{"answer": 42}'),
    ("llama3", '  {"name": "Bob", "age": 5}'),
    ("llama3", "{}"),
    ("llama3", "<|python_tag|>print(1)"),
    ("llama3", f"Then {CALL}"),
    ("mistral", "[1, 2]"),
    ("mistral", '[TOOL_CALLS]"x"'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL"),
    ("mistral", "[TOOL_CALLS]weather(1)"),
    ("phi4", "functools is a module"),
    ("phi4", "functools[1]"),
    ("qwen3coder", "<tool_call>{}</tool_call>"),
    ("qwen3coder", "<tool_call>\n<function=weather"),
    ("qwen3coder", "<function=>"),
    ("gptoss", "plain"),
    ("gptoss", "<|channel|>other<|message|>x"),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_is_no_call_is_content_and_nothing_is_lost(name: str, text: str) -> None:
    assert parsed(name, text) == Parsed(content=text)


def test_a_call_behind_a_broken_one_is_found() -> None:
    found = parsed("hermes3", f"<tool_call>{{oops <tool_call>{CALL}</tool_call>")
    assert (found.content, found.calls) == ("<tool_call>{oops", [PARIS])


def test_what_is_wrong_behind_a_call_in_an_array_is_content() -> None:
    found = parsed("mistral", f"[TOOL_CALLS][{CALL}, oops]")
    assert (found.content, found.calls) == (",oops]", [PARIS])


def test_the_name_comes_first_and_then_arguments_as_they_are_written() -> None:
    parser = OutputParser(grammar_of("hermes3"))
    pieces = ["Hi <tool", '_call>{"name": "f", "argu', 'ments": ', '{"a": ', '"b', '"}', "}</tool_call>"]
    assert [parser.feed(piece) for piece in pieces] == [
        [Content("Hi")],
        [],
        [],
        [CallStart("f"), Arguments('{"a": ')],
        [Arguments('"b')],
        [Arguments('"}')],
        [],
    ]
    assert parser.finish() == []


# Reasoning.


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("qwen3", "", "<think>\nHm.\n</think>\n\nYes.", "\nHm.\n", "\n\nYes."),
        ("qwen3", "", "\n<think>Hm.", "Hm.", ""),
        ("qwen3", "", "Yes.", "", "Yes."),
        ("qwen3", "", "Yes <think>no</think>", "", "Yes <think>no</think>"),
        ("qwen3", "", "<think></think>Yes.", "", "Yes."),
        ("qwen3", "", "<thin", "", "<thin"),
        ("qwen3", "…<think>\n", "Hm.</think>Yes.", "Hm.", "Yes."),
        ("qwen3", "…<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("deepseek_r1", "", "Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek", "", "Hm. </thin", "Hm. </thin", ""),
        ("deepseek_r1", "<think></think>\n", "Yes.", "", "Yes."),
        ("gptoss", "", "<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>Yes.", "Hm.", "Yes."),
    ],
)
def test_reasoning_is_told_from_content(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    grammar = answer_grammar("", name, tools=[], prompt=prompt)
    assert parse(grammar, text) == Parsed(content, reasoning)
    assert parse(answer_grammar("", name, tools=[], prompt=prompt), *text) == Parsed(content, reasoning)


def test_calls_follow_reasoning_and_are_not_looked_for_within_it() -> None:
    text = f"<think>a <tool_call>{CALL}</tool_call></think>\n\n<tool_call>{CALL_2}</tool_call>"
    found = parse(answer_grammar("hermes3", "qwen3", tools=[WEATHER], prompt=""), *text)
    assert found == Parsed("", f"a <tool_call>{CALL}</tool_call>", [ROME])


# Which grammar.


def test_without_tools_nothing_is_a_call() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert parse(answer_grammar("hermes3", "", tools=[], prompt=""), text) == Parsed(text)


def test_one_call_leaves_out_the_others() -> None:
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL_2}</tool_call>Done."
    found = parse(answer_grammar("hermes3", "", tools=[WEATHER], prompt="", one_call=True), *text)
    assert found == Parsed("Done.", "", [PARIS])


def test_a_required_call_is_an_array() -> None:
    text = '[{"name": "weather", "parameters": {"city": "Paris"}} , {"name": "weather", "parameters": {}}] '
    assert parse(forced.required, *text) == Parsed(calls=[PARIS, ("weather", "{}")])
    assert parse(forced.required, "[{") == Parsed("[{")


def test_a_named_call_is_its_arguments() -> None:
    assert parse(forced.named("weather"), *' {"city": "Paris"}\n') == Parsed(calls=[PARIS])
    assert parse(forced.named("weather"), '{"ci') == Parsed(calls=[("weather", '{"ci')])
    assert parse(forced.named("weather"), "no") == Parsed("no")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    check_parser_names("", "")
    check_parser_names("hermes3", "qwen3")
    with pytest.raises(ModelFolderError, match="unknown tool_parser 'hermes4'") as refused:
        check_parser_names("hermes4", "")
    assert refused.value.hint == "known are " + ", ".join(sorted(TOOL_FORMATS))
    with pytest.raises(ModelFolderError, match="unknown reasoning_parser 'x'") as refused:
        check_parser_names("", "x")
    assert refused.value.hint == "known are " + ", ".join(sorted(REASONING_FORMATS))


def test_markers_are_those_of_both_parsers() -> None:
    assert visible_markers("", "") == ()
    assert visible_markers("llama3", "qwen3") == ("<|python_tag|>", "<think>", "</think>")


# Any text, cut anywhere.

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=", "weather>", "<parameter=city>", "</parameter>", "</function>"),
    *("[TOOL_CALLS]", "[ARGS]", "functools", "<|python_tag|>", "<think>", "</think>", "<|channel|>", "<|message|>"),
    *("<|end|>", "final", "analysis", "commentary to=functions.f"),
    *(
        '{"name": "f", ',
        '"arguments": ',
        '{"a": "é"}',
        "}",
        "[",
        "]",
        ",",
        ";",
        '"',
        "{",
        "null",
        "\\",
        " ",
        "\n",
        "🐍",
    ),
    CALL,
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)
grammars = st.tuples(st.sampled_from(["", *TOOL_FORMATS]), st.sampled_from(["", *REASONING_FORMATS]))


@given(names=grammars, text=texts, data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_splitting_gives_the_same_result(names: tuple[str, str], text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def grammar() -> Grammar:
        return answer_grammar(names[0], names[1], tools=[WEATHER], prompt="")

    assert parse(grammar(), *pieces) == parse(grammar(), text)


@given(text=texts, data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_splitting_of_a_forced_call_gives_the_same_result(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    for grammar in (forced.required, forced.named("f")):
        assert parse(grammar, text[:cut], text[cut:]) == parse(grammar, text)
