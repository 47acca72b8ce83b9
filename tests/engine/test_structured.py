"""Constraints: what compiles, what is refused and why, in which time, and which texts a matcher lets through."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.engine import grammar, structured
from ovms_lora.engine.structured import CompiledConstraint, ConstraintCompiler
from ovms_lora.engine.tokenizer import Tokenizer
from tests.fakes import EOS, VOCAB_SIZE, byte_tokenizer

SECONDS = 8.0  # what no compilation takes, also on a machine that is busy

COMPILER = ConstraintCompiler(byte_tokenizer(), [EOS])


def schema(value: Any) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.JSON_SCHEMA, value if isinstance(value, str) else json.dumps(value))


def regex(source: str) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.REGEX, source)


def lark(source: str) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.GRAMMAR, source)


def choice(*choices: str) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.CHOICE, choices)


JSON_OBJECT = ConstraintSpec(ConstraintKind.JSON_OBJECT)


def compiled(spec: ConstraintSpec) -> CompiledConstraint:
    return COMPILER.compile(spec, param="field")


def matches(constraint: CompiledConstraint, text: str) -> bool:
    """Whether the whole text is allowed, byte by byte, and may end there."""
    matcher = constraint.matcher()
    for token in text.encode():
        if not matcher.allowed(VOCAB_SIZE)[token]:
            return False
        matcher.accept(token)
    return bool(matcher.finished or matcher.allowed(VOCAB_SIZE)[EOS])


# Which texts match.

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SHAPES = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"], "additionalProperties": False}
        for kind in ("circle", "square")
    ]
}

MATCHING = [
    (JSON_OBJECT, '{"a": [1, 2.5e3, null, {"b": "ä\\n"}]}'),
    (JSON_OBJECT, "{}"),
    (JSON_OBJECT, json.dumps({"a": {"b": [1, 2]}, "c": {}}, indent=8)),
    (schema(PERSON), '{"name": "Zoë", "age": 3}'),
    (schema(TREE), '{"children":[{"children":[]},{"children":[{"children":[]}]}]}'),
    (schema(SHAPES), '{"kind":"square"}'),
    (schema({"enum": ["a", 1, None]}), "null"),
    (schema({"type": "string", "pattern": "^a+$"}), '"aaa"'),
    (schema({"type": "string", "title": "T", "description": "d", "default": "x", "x-mine": 1}), '"x"'),
    (regex("[a-c]{3}-[0-9]+"), "abc-17"),
    (regex("^a/b$"), "a/b"),
    (choice("yes", "no"), "no"),
    (choice("ä😀", 'a"b\\c\n\t\x00', "(a|b)*", "\x7f\u2028"), 'a"b\\c\n\t\x00'),
    (choice("ä😀", "(a|b)*"), "ä😀"),
    (choice("ä😀", "(a|b)*"), "(a|b)*"),
    (choice("a", "ab"), "ab"),
    (lark('root ::= "a" | "(" root ")"'), "((a))"),
    (lark('start: "a" | "(" start ")"'), "((a))"),
]

NOT_MATCHING = [
    (JSON_OBJECT, "[1]"),
    (JSON_OBJECT, '{"a": 1'),
    (JSON_OBJECT, '{"a":  1}'),
    (JSON_OBJECT, '{\n\n"a": 1}'),
    (schema(PERSON), '{"name": "Zoë", "age": -3}'),
    (schema(PERSON), '{"name": "Zoë"}'),
    (schema(PERSON), '{"name": "Zoë", "age": 3, "x": 1}'),
    (schema(SHAPES), '{"kind":"line"}'),
    (regex("[a-c]{3}"), "ab"),
    (choice("(a|b)*"), "ab"),
    (lark('root ::= "a" | "(" root ")"'), "((a)"),
]


@pytest.mark.parametrize(("spec", "text"), MATCHING)
def test_a_matching_text_may_be_written(spec: ConstraintSpec, text: str) -> None:
    assert matches(compiled(spec), text)


@pytest.mark.parametrize(("spec", "text"), NOT_MATCHING)
def test_another_text_may_not(spec: ConstraintSpec, text: str) -> None:
    assert not matches(compiled(spec), text)


def test_a_choice_that_begins_another_may_end_or_go_on() -> None:
    matcher = compiled(choice("a", "ab")).matcher()
    matcher.accept(ord("a"))
    assert np.flatnonzero(matcher.allowed(VOCAB_SIZE)).tolist() == [ord("b"), EOS]
    assert not matcher.finished
    matcher.accept(ord("b"))
    assert matcher.finished


def test_matchers_of_one_constraint_go_their_own_ways() -> None:
    constraint = compiled(choice("ab", "cd"))
    first, second = constraint.matcher(), constraint.matcher()
    first.accept(ord("a"))
    assert np.flatnonzero(second.allowed(VOCAB_SIZE)).tolist() == [ord("a"), ord("c")]
    second.accept(ord("c"))
    assert np.flatnonzero(first.allowed(VOCAB_SIZE)).tolist() == [ord("b")]


def test_a_fork_begins_where_its_parent_is_and_goes_its_own_way() -> None:
    parent = compiled(choice("abc", "abd")).matcher()
    for token in b"ab":
        parent.accept(token)
    child = parent.fork()
    child.accept(ord("c"))
    assert child.finished
    assert np.flatnonzero(parent.allowed(VOCAB_SIZE)).tolist() == [ord("c"), ord("d")]


@pytest.mark.parametrize("width", [100, VOCAB_SIZE, 300])
def test_the_mask_has_the_width_of_the_logits(width: int) -> None:
    """A model may have more logits than its tokenizer has tokens: nobody may choose those."""
    allowed = compiled(choice("a", "b")).matcher().allowed(width)
    assert allowed.shape == (width,)
    assert np.flatnonzero(allowed).tolist() == [97, 98]


# What is refused, and why.

REFUSED = [
    (schema("{"), "it is not JSON"),
    (schema("[]"), "it is not a JSON object"),
    (schema('{"a": NaN}'), "expected value"),
    (schema({"type": "strin"}), "Invalid type: strin"),
    (schema({"$ref": "#/$defs/nope"}), "Pointer '/$defs/nope' does not exist"),
    (schema({"$ref": "http://example.com/x.json"}), "Resource 'http://example.com/x.json' is not present"),
    (schema({"$ref": "file:///etc/passwd"}), "Resource 'file:///etc/passwd' is not present"),
    (schema({"$ref": "#"}), "no text matches it"),
    (schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "no text"),
    (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "Unsatisfiable schema"),
    (schema({"enum": []}), "Unsatisfiable schema"),
    (schema({"type": "string", "format": "nonsense"}), "Unknown format: nonsense"),
    (schema({"type": "string", "pattern": "("}), "unclosed group"),
    (schema({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "oneOf"),
    *(
        (schema({"type": ["object", "array"], key: value}), f'Unimplemented keys: ["{key}"]')
        for key, value in {
            "not": {},
            "if": {},
            "contains": {},
            "uniqueItems": True,
            "propertyNames": {},
            "dependentRequired": {},
            "unevaluatedProperties": False,
            "$dynamicRef": "#a",
        }.items()
    ),
    (schema({"x-guidance": {"lenient": True}, "not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    (regex("("), "unclosed group"),
    (regex("(?=a)b"), "look-around, including look-ahead and look-behind, is not supported"),
    (regex(r"(a)\1"), "backreferences are not supported"),
    (regex("a\\"), "it ends in a backslash"),
    (regex("[^\\x00-\\U0010ffff]"), "no text matches it"),
    (choice("\ud800"), "it is not Unicode"),
    (lark("root ::= foo"), "Rule 'foo' not found"),
    (lark("start: foo"), 'unknown name: "foo"'),
    (lark("%%%"), "Expected name at line 1"),
    (lark("start: @other"), "unknown grammar @other"),
    (lark("start: <|nope|>"), 'unknown special token: "<|nope|>"'),
    (lark('%import .etc.passwd\nstart: "a"'), "Unknown common regex"),
]


@pytest.mark.parametrize(("spec", "reason"), REFUSED)
def test_what_does_not_compile_is_refused_with_the_reason(spec: ConstraintSpec, reason: str) -> None:
    with pytest.raises(InvalidFieldError) as refused:
        compiled(spec)
    message = refused.value.message
    assert message.startswith("field does not compile: ")
    assert reason in message
    assert refused.value.param == "field"
    assert "\n" not in message
    assert len(message) < 400


# Hostile sources.


def nested(depth: int, key: str) -> str:
    return f'{{"{key}":' * depth + "{}" + "}" * depth


def chain(length: int, link: Any) -> ConstraintSpec:
    """A schema whose definitions refer each to the next; `link(ref)` makes one of a reference."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return schema({"$defs": definitions | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def doubled(times: int, leaf: str, name: str) -> str:
    """Rules or terminals of which each is the one before it, twice."""
    rules = "".join(f"{name}{i + 1}: {name}{i} {name}{i}\n" for i in range(times))
    return f"start: {name}{times}\n{name}0: {leaf}\n{rules}"


def in_arrays(ref: Any, depth: int = 60) -> Any:
    for _ in range(depth):
        ref = {"items": ref}
    return ref


HOSTILE_REFUSED = {
    "a deep schema": schema(nested(101, "items")),
    "a very deep schema": schema(nested(5000, "items")),
    "brackets without end": schema("[" * 100_000),
    "a large schema": schema({"enum": [f"value {i}" for i in range(20_000)]}),
    "a long string": schema({"const": "x" * 8193}),
    "a long name": schema({"required": ["x" * 8193], "properties": {"x" * 8193: {}}}),
    "long patterns": schema({"anyOf": [{"pattern": "a?" * 1000}] * 5}),
    "a large multiple": schema({"type": "integer", "multipleOf": 999_983}),
    "many multiples": schema({"anyOf": [{"type": "integer", "multipleOf": 9000 + i} for i in range(9)]}),
    "a small but long multiple": schema({"type": "number", "multipleOf": 0.00999983}),
    "too many references": chain(2700, lambda ref: ref),
    "too many nested references": chain(140, in_arrays),
    "alternatives that multiply": schema(
        {"allOf": [{"anyOf": [{"properties": {f"{n}{i}": {"type": "string"}}} for n in "pq"]} for i in range(30)]}
    ),
    "a long regular expression": regex("a" * 8193),
    "a regular expression of groups": regex("(" * 1000 + "a" + ")" * 1000),
    "a long choice": choice("x" * 8193),
    "many choices": choice(*(f"choice {i}" for i in range(20_000))),
    "a grammar of groups": lark("start: " + "(" * 2000 + '"a"' + ")" * 2000),
    "an EBNF of groups": lark("root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
    "a long grammar": lark('start: "a"\n' + "// x\n" * 2000),
    "terminals that double very often": lark(doubled(40, "/a?/", "A")),
}

# With more or with fewer tokens these are refused or not.
HOSTILE_COSTLY = {
    "optional letters": regex("a?" * 4000),
    "terminals that double": lark(doubled(13, "/a?/", "A")),
    "optional terminals": lark("start: " + '"a"? ' * 1500),
    "a large sum of multiples": schema({"anyOf": [{"type": "integer", "multipleOf": 90 + i} for i in range(80)]}),
}

HOSTILE_ACCEPTED = {
    "a schema at the bound of nesting": schema(nested(99, "items")),
    "references at the bound": chain(1300, lambda ref: ref),
    "references through objects": chain(1200, lambda ref: {"properties": {"a": ref}}),
    "references through alternatives": chain(1200, lambda ref: {"anyOf": [ref, {"type": "integer"}]}),
    "references that double": chain(40, lambda ref: {"properties": {"a": ref, "b": ref}, "required": ["a", "b"]}),
    "a large enum": schema({"enum": [f"value {i}" for i in range(6000)]}),
    "a thousand properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
    "a long text": schema({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000}),
    "a long array": schema({"type": "array", "minItems": 100_000, "maxItems": 200_000}),
    "stars of stars": regex("(((a*)*)*)*b"),
    "repetitions of repetitions": regex("((((a{1,100}){1,100}){1,100}){1,100})"),
    "a large automaton": regex("(a|b)*a(a|b){24}"),
    "left recursion": lark('root ::= root "a" | "b"'),
    "an ambiguous grammar": lark('root ::= root root | "a" | ""'),
    "rules that double": lark(doubled(10, '"a"', "a")),
    "a chain of rules": lark("".join(f'r{i}: "x" r{i + 1}\n' for i in range(450)) + 'r450: "z"\nstart: r0'),
}


@pytest.mark.parametrize("name", HOSTILE_REFUSED)
def test_a_hostile_source_is_refused_in_bounded_time(name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidFieldError):
        compiled(HOSTILE_REFUSED[name])
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("name", HOSTILE_COSTLY)
def test_what_costs_most_takes_bounded_time(name: str) -> None:
    begin = time.monotonic()
    with contextlib.suppress(InvalidFieldError):
        compiled(HOSTILE_COSTLY[name])
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("name", HOSTILE_ACCEPTED)
def test_a_hostile_source_within_the_bounds_can_be_followed_on_a_small_stack(name: str) -> None:
    """The engine's thread has no larger stack than others, and the compilation has one of its own."""
    begin = time.monotonic()
    constraint = compiled(HOSTILE_ACCEPTED[name])
    assert time.monotonic() - begin < SECONDS
    steps: list[int] = []

    def follow() -> None:
        rng, matcher = np.random.default_rng(0), constraint.matcher()
        for step in range(40):
            allowed = np.flatnonzero(matcher.allowed(VOCAB_SIZE))
            assert len(allowed), matcher.failure
            matcher.accept(int(rng.choice(allowed)))
            steps.append(step)
            if matcher.finished:
                break

    before = threading.stack_size(256 * 1024)
    thread = threading.Thread(target=follow)
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert steps


def test_a_text_that_becomes_too_ambiguous_ends_with_a_reason() -> None:
    matcher = compiled(lark('root ::= "b" x\nx ::= "a" x')).matcher()
    matcher.accept(ord("b"))
    assert not matcher.allowed(VOCAB_SIZE).any()
    assert not matcher.finished
    assert matcher.failure
    assert "the text cannot follow its constraint any more: parser error: Too many items" in matcher.failure.message
    assert not matcher.allowed(VOCAB_SIZE).any()


# What is kept.


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConstraintCompiler]:
    monkeypatch.setattr(structured, "_KEPT", 2)
    monkeypatch.setattr(structured, "_KEPT_BYTES", 100)
    yield ConstraintCompiler(byte_tokenizer(), [EOS])


def test_the_constraints_that_were_used_last_are_kept(small_cache: ConstraintCompiler) -> None:
    a, b, c = (choice(letter) for letter in "abc")
    first = small_cache.compile(a, param="")
    small_cache.compile(b, param="")
    assert small_cache.compile(choice("a"), param="") is first
    small_cache.compile(c, param="")
    assert [spec for spec in (a, b, c) if small_cache.kept(spec)] == [a, c]


def test_large_sources_are_not_kept_for_long(small_cache: ConstraintCompiler) -> None:
    large, larger = choice("x" * 60), regex("y" * 90)
    small_cache.compile(large, param="")
    small_cache.compile(larger, param="")
    assert small_cache.kept(large) is None
    assert small_cache.kept(larger)


def test_a_constraint_whose_lexer_is_full_is_compiled_anew() -> None:
    """Its matchers share the lexer, so one text could fill it for all that follow."""
    spec = regex("([ab]*a[ab]{20}b?[ab]{3})*")
    full, rng = compiled(spec), np.random.default_rng(0)
    matcher = full.matcher()
    while matcher.allowed(VOCAB_SIZE).any():
        matcher.accept(int(rng.choice([ord("a"), ord("b")])))
    assert matcher.failure
    assert "too many states" in matcher.failure.message
    assert COMPILER.kept(spec) is None
    anew = compiled(spec)
    assert anew is not full
    assert anew.matcher().allowed(VOCAB_SIZE).any()
    assert COMPILER.kept(spec) is anew


# Tokenizers of other kinds.


def pieces_tokenizer() -> Tokenizer:
    """A vocabulary as SentencePiece makes it: `▁` for a space, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁yes", "▁no", "é", '"', "a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


def test_pieces_and_byte_tokens_both_write_a_text() -> None:
    tokenizer = pieces_tokenizer()
    matcher = ConstraintCompiler(tokenizer, [2]).compile(choice(" yes", "éa"), param="").matcher()
    names = ["▁", "▁yes", "é", "<0x20>", "<0xC3>"]
    assert np.flatnonzero(matcher.allowed(tokenizer.vocab_size)).tolist() == sorted(
        token for name in names if (token := tokenizer.token_id(name)) is not None
    )
    for name in ("<0xC3>", "<0xA9>", "a"):
        token = tokenizer.token_id(name)
        assert token is not None
        assert matcher.allowed(tokenizer.vocab_size)[token]
        matcher.accept(token)
    assert matcher.finished


def test_special_tokens_are_no_text() -> None:
    tokenizer = pieces_tokenizer()
    matcher = ConstraintCompiler(tokenizer, [2]).compile(regex("(.|\n)*"), param="").matcher()
    allowed = matcher.allowed(tokenizer.vocab_size)
    assert allowed[:3].tolist() == [False, False, True]
    assert not matcher.finished


def test_a_tokenizer_that_cannot_be_followed_says_so(caplog: pytest.LogCaptureFixture) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    compiler = ConstraintCompiler(Tokenizer(backend), [])
    with pytest.raises(InvalidFieldError, match="field is not supported with the tokenizer of this model"):
        compiler.compile(JSON_OBJECT, param="field")
    assert "structured output is not available" in caplog.text


def test_the_bounds_of_sources_are_those_that_were_measured() -> None:
    """Larger ones need new measurements of time and stack."""
    assert (grammar.MAX_LEVELS * 7 * 1024) * 2 < structured._STACK_BYTES
