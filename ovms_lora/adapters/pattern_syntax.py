"""From the text of a regular expression to a program of steps; the other half is `pattern`, which runs it.

Owns which part of Python's `re` syntax is taken. What cannot be matched in bounded time, or would need a report of
groups (backreferences, lookbehind, inline flags, atomic and conditional groups, possessive quantifiers), is refused.
Jumps are relative, so a counted repeat is its body copied.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

_MOST_STEPS = 4000
_DEEPEST_GROUP = 30
_ASCII = frozenset(map(chr, range(128)))
_DIGITS = frozenset("0123456789")
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_SPACE = frozenset(" \t\n\r\f\v")
# Classes hold ASCII only: names of modules are ASCII, and what is not matches nothing.
_CATEGORIES = {
    "d": _DIGITS,
    "D": _ASCII - _DIGITS,
    "w": _WORD,
    "W": _ASCII - _WORD,
    "s": _SPACE,
    "S": _ASCII - _SPACE,
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


class Op(IntEnum):
    """What one step of a program does."""

    TEXT = 0  # `text` follows
    ONE_OF = 1  # one of the `texts` follows
    ANY = 2  # any character but a newline
    CLASS = 3  # a character of `chars`
    ANY_RUN = 4  # any number of ANY
    CLASS_RUN = 5  # any number of CLASS
    SPLIT = 6  # go on at +x and at +y
    JUMP = 7  # go on at +x
    START = 8
    END = 9
    BORDER = 10  # between a word character and none (y = 1), or not (y = 0)
    AHEAD = 11  # the steps up to +x match from here (y = 1) or do not (y = 0)
    MATCH = 12


class Step(NamedTuple):
    """One step; which of the operands count depends on `op`."""

    op: Op
    text: str = ""
    texts: tuple[str, ...] = ()
    chars: frozenset[str] = frozenset()
    x: int = 0
    y: int = 0


_ANCHORS = ("\\b", "\\B", "\\A", "\\Z")
_SPECIAL = {".": Step(Op.ANY), "^": Step(Op.START), "$": Step(Op.END)}


class PatternSyntaxError(ValueError):
    """The text is no regular expression."""


class PatternUnsupportedError(ValueError):
    """The text is a regular expression that this module does not take."""


def compile_steps(pattern: str) -> tuple[Step, ...]:
    """Return the program of `pattern`. Raises PatternSyntaxError, PatternUnsupportedError."""
    reader = _Reader(pattern)
    steps = _alternatives(reader, depth=0)
    if reader.rest():
        raise PatternSyntaxError("unbalanced parenthesis")
    return (*steps, Step(Op.MATCH))


class _Reader:
    """The pattern and how far it has been read."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def rest(self) -> bool:
        return self.at < len(self.pattern)

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        if not self.rest():
            raise PatternSyntaxError("the pattern ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def skip(self, text: str) -> bool:
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True


def _alternatives(reader: _Reader, depth: int) -> list[Step]:
    if depth > _DEEPEST_GROUP:
        raise PatternUnsupportedError(f"groups are nested deeper than {_DEEPEST_GROUP}")
    branches = [_sequence(reader, depth)]
    while reader.skip("|"):
        branches.append(_sequence(reader, depth))
    if len(branches) > 1 and all(len(branch) == 1 and branch[0].op is Op.TEXT for branch in branches):
        # One step instead of a fan of splits: lists of module names are what alternatives are mostly used for.
        return [Step(Op.ONE_OF, texts=tuple(branch[0].text for branch in branches))]
    steps = branches.pop()
    for branch in reversed(branches):
        split = Step(Op.SPLIT, x=1, y=len(branch) + 2)
        steps = _bounded([split, *branch, Step(Op.JUMP, x=len(steps) + 1), *steps])
    return steps


def _sequence(reader: _Reader, depth: int) -> list[Step]:
    steps: list[Step] = []
    after_text = False  # whether the last step is text that nothing repeats, so that more can be joined to it
    while reader.rest() and reader.peek() not in "|)":
        anchor = reader.peek() in "^$" or reader.pattern.startswith(_ANCHORS, reader.at)
        item = _item(reader, depth)
        quantified = _quantified(reader, item, anchor=anchor)
        is_text = quantified is item and len(item) == 1 and item[0].op is Op.TEXT
        if is_text and after_text:
            steps[-1] = Step(Op.TEXT, text=steps[-1].text + item[0].text)
        else:
            steps += quantified
        after_text = is_text
        _bounded(steps)
    return steps


def _item(reader: _Reader, depth: int) -> list[Step]:
    if _quantifier(reader) is not None:
        raise PatternSyntaxError("nothing to repeat")
    char = reader.take()
    if char == "(":
        return _group(reader, depth)
    if char == "[":
        return [Step(Op.CLASS, chars=_char_class(reader))]
    if char == "\\":
        return [_escape(reader)]
    return [_SPECIAL.get(char) or Step(Op.TEXT, text=char)]


def _group(reader: _Reader, depth: int) -> list[Step]:
    ahead: int | None = None
    if reader.skip("?"):
        if reader.skip("=") or reader.skip("!"):
            ahead = int(reader.pattern[reader.at - 1] == "=")
        elif reader.skip("P<"):
            _group_name(reader)
        elif not reader.skip(":"):
            raise PatternUnsupportedError("only plain, named and lookahead groups are taken")
    steps = _alternatives(reader, depth + 1)
    if not reader.skip(")"):
        raise PatternSyntaxError("missing ), unterminated group")
    if ahead is None:
        return steps
    return [Step(Op.AHEAD, x=len(steps) + 2, y=ahead), *steps, Step(Op.MATCH)]


def _group_name(reader: _Reader) -> None:
    name, closed, _ = reader.pattern[reader.at :].partition(">")
    if not closed or not name.isidentifier():
        raise PatternSyntaxError("a group has no usable name")
    reader.at += len(name) + 1


def _escape(reader: _Reader) -> Step:
    char = reader.take()
    if char in _CATEGORIES:
        return Step(Op.CLASS, chars=_CATEGORIES[char])
    if char in "bB":
        return Step(Op.BORDER, y=int(char == "b"))
    if char in "AZ":
        return Step(Op.START if char == "A" else Op.END)
    return Step(Op.TEXT, text=_literal_escape(char))


def _literal_escape(char: str) -> str:
    if char in _CONTROLS:
        return _CONTROLS[char]
    if char.isascii() and char.isalnum():
        raise PatternUnsupportedError(f"escape \\{char} is not taken")
    return char


def _char_class(reader: _Reader) -> frozenset[str]:
    negated = reader.skip("^")
    chars: frozenset[str] = frozenset()
    first = True
    while first or reader.peek() != "]":
        first = False
        low = _class_member(reader)
        if reader.peek() != "-" or reader.pattern[reader.at + 1 : reader.at + 2] in ("]", ""):
            chars |= low
            continue
        reader.take()
        chars |= _char_range(low, _class_member(reader))
    reader.take()
    return _ASCII - chars if negated else chars


def _class_member(reader: _Reader) -> frozenset[str]:
    char = reader.take()
    if char != "\\":
        return frozenset(char)
    char = reader.take()
    if char == "b":
        return frozenset("\b")
    return _CATEGORIES.get(char) or frozenset(_literal_escape(char))


def _char_range(low: frozenset[str], high: frozenset[str]) -> frozenset[str]:
    if len(low) != 1 or len(high) != 1 or min(low) > min(high):
        raise PatternSyntaxError("bad character range")
    return frozenset(char for char in _ASCII if min(low) <= char <= min(high))


def _quantified(reader: _Reader, item: list[Step], *, anchor: bool) -> list[Step]:
    bounds = _quantifier(reader)
    if bounds is None:
        return item
    if anchor:
        raise PatternSyntaxError("nothing to repeat")
    reader.skip("?")  # lazy: the same to a yes-or-no question
    if reader.peek() == "+":
        raise PatternUnsupportedError("possessive quantifiers are not taken")
    if _quantifier(reader) is not None:
        raise PatternSyntaxError("multiple repeat")
    return _repeated(item, *bounds)


def _quantifier(reader: _Reader) -> tuple[int, int | None] | None:
    for char, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
        if reader.skip(char):
            return bounds
    return _counted(reader) if reader.peek() == "{" else None


def _counted(reader: _Reader) -> tuple[int, int | None] | None:
    """Read `{m}`, `{m,}`, `{,n}` or `{m,n}`; anything else in braces is plain text, as to `re`."""
    inside, closed, _ = reader.pattern[reader.at + 1 :].partition("}")
    low, comma, high = inside.partition(",")
    if not closed or not inside or not all(part == "" or (part.isascii() and part.isdigit()) for part in (low, high)):
        return None
    if len(low) > 5 or len(high) > 5:
        raise PatternUnsupportedError("a count is too large")
    reader.at += len(inside) + 2
    least = int(low or 0)
    most = (int(high) if high else None) if comma else least
    if most is not None and most < least:
        raise PatternSyntaxError("min repeat greater than max repeat")
    return least, most


def _repeated(item: list[Step], least: int, most: int | None) -> list[Step]:
    optional = 0 if most is None else most - least
    if (least + optional) * (len(item) + 1) > _MOST_STEPS:
        raise PatternUnsupportedError("the pattern is too large")
    steps = item * least
    if most is None and len(item) == 1 and (run := _run(item[0])):
        return [*steps, run]
    if most is None:
        back = -len(item) - 1
        return [*steps, Step(Op.SPLIT, x=1, y=len(item) + 2), *item, Step(Op.JUMP, x=back)]
    left = optional * (len(item) + 1)
    for _ in range(optional):
        steps += [Step(Op.SPLIT, x=1, y=left), *item]
        left -= len(item) + 1
    return steps


def _run(step: Step) -> Step | None:
    """Any number of a step that takes one character, as one step: most patterns repeat nothing else."""
    if step.op is Op.ANY:
        return Step(Op.ANY_RUN)
    if step.op is Op.CLASS:
        return Step(Op.CLASS_RUN, chars=step.chars)
    return Step(Op.CLASS_RUN, chars=frozenset(step.text)) if step.op is Op.TEXT and len(step.text) == 1 else None


def _bounded(steps: list[Step]) -> list[Step]:
    if len(steps) > _MOST_STEPS:
        raise PatternUnsupportedError("the pattern is too large")
    return steps
