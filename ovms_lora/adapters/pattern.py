"""Regular expressions from hostile files, matched in bounded time.

PEFT hands `target_modules` and the keys of `rank_pattern` to Python's `re`, which a pattern of ten characters can keep
busy for years. Here a pattern is a small program (Thompson's construction, built by `pattern_syntax`) that is run over
all positions of the text together. No step sees a position twice, so one match costs at most steps times length, and
once more times length inside of a lookahead. A budget shared by all matches of one load bounds the sum.

It answers only *whether* a text matches as a whole, as `re.fullmatch` does: without groups to report, greedy and lazy
quantifiers are the same. Knows nothing of modules or adapters.
"""

from __future__ import annotations

from heapq import heappop, heappush

from ovms_lora.adapters.pattern_syntax import (
    Op,
    PatternSyntaxError,
    PatternUnsupportedError,
    Step,
    compile_steps,
)
from ovms_lora.adapters.quoting import quoted
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

_LONGEST_PATTERN = 4096
_STEPS_PER_LOAD = 20_000
_STEPS_PER_CHARACTER = 2  # compiling a character takes about as long as so many steps


class StepBudget:
    """How many steps all patterns of one adapter may take together."""

    def __init__(self, steps: int = _STEPS_PER_LOAD) -> None:
        self._left = steps

    @property
    def left(self) -> int:
        """Steps that may still be taken."""
        return self._left

    def spend(self, steps: int, field: str) -> None:
        """Raise AdapterError(CONFIG_INVALID) when the patterns of an adapter cost more than any honest ones."""
        self._left -= steps
        if self._left < 0:
            raise AdapterError(AdapterErrorCode.CONFIG_INVALID, f"{field}: the pattern takes too long to match")


class Pattern:
    """One regular expression. `field` names where it came from, in errors.

    Raises AdapterError: CONFIG_INVALID for what is no regular expression, UNSUPPORTED for syntax that is not taken.
    """

    def __init__(self, pattern: str, *, field: str, budget: StepBudget) -> None:
        self._field = field
        self._budget = budget
        if len(pattern) > _LONGEST_PATTERN:
            raise AdapterError(
                AdapterErrorCode.CONFIG_INVALID, f"{field}: a pattern is longer than {_LONGEST_PATTERN} characters"
            )
        budget.spend(len(pattern) * _STEPS_PER_CHARACTER, field)
        try:
            self._steps = compile_steps(pattern)
        except PatternSyntaxError as error:
            raise AdapterError(
                AdapterErrorCode.CONFIG_INVALID, f"{field}: {quoted(pattern)} is no regular expression: {error}"
            ) from error
        except PatternUnsupportedError as error:
            raise AdapterError(
                AdapterErrorCode.UNSUPPORTED, f"{field}: {quoted(pattern)} is not supported: {error}"
            ) from error

    def fullmatch(self, text: str) -> bool:
        """Whether the whole of `text` matches. Raises AdapterError when the budget is used up."""
        return _Search(self._steps, text, self._field, self._budget).matches(0, 1, to_end=True)


class _Search:
    """One text against one program. A set of positions is an int with a bit for each, so a step moves them all at once.

    The answers of lookaheads are kept per (step, position).
    """

    def __init__(self, steps: tuple[Step, ...], text: str, field: str, budget: StepBudget) -> None:
        self._steps = steps
        self._text = text
        self._field = field
        self._budget = budget
        self._all = (2 << len(text)) - 1
        self._found: dict[str, int] = {}
        self._taking: dict[frozenset[str], int] = {}
        self._ahead: dict[tuple[int, int], bool] = {}

    def matches(self, start: int, positions: int, *, to_end: bool) -> bool:
        """Whether the program from step `start` on reaches MATCH from `positions`; with `to_end` at the text's end."""
        accepting = 1 << len(self._text) if to_end else self._all
        reached = {start: positions}
        fresh = {start: positions}
        waiting = [start]  # the keys of `fresh`, lowest first: nearly all moves go forward
        spent = 0
        while waiting and spent <= self._budget.left:
            at = heappop(waiting)
            positions = fresh.pop(at)
            spent += 1
            step = self._steps[at]
            if step.op is Op.MATCH:
                if positions & accepting:
                    self._budget.spend(spent, self._field)
                    return True
                continue
            for to, moved in self._moves(step, at, positions):
                new = moved & ~reached.get(to, 0)
                if new:
                    reached[to] = reached.get(to, 0) | new
                    if to not in fresh:
                        heappush(waiting, to)
                    fresh[to] = fresh.get(to, 0) | new
        self._budget.spend(spent, self._field)
        return False

    def _moves(self, step: Step, at: int, positions: int) -> tuple[tuple[int, int], ...]:
        """Where one step leads: (step, positions) pairs."""
        if step.op is Op.SPLIT:
            return (at + step.x, positions), (at + step.y, positions)
        if step.op is Op.JUMP:
            return ((at + step.x, positions),)
        if step.op is Op.AHEAD:
            return ((at + step.x, self._looking_ahead(step, at, positions)),)
        if step.op is Op.ONE_OF:
            return tuple((at + 1, self._text_taken(text, positions)) for text in step.texts)
        return ((at + 1, self._moved(step, positions)),)

    def _moved(self, step: Step, positions: int) -> int:
        match step.op:
            case Op.ANY | Op.CLASS:
                return (positions & self._takers(step.chars)) << 1
            case Op.ANY_RUN | Op.CLASS_RUN:
                return self._run(positions, self._takers(step.chars))
            case Op.START:
                return positions & 1
            case Op.END:
                return positions & self._ends()
            case Op.BORDER:
                return positions & self._borders(step.y == 1)
        return self._text_taken(step.text, positions)

    def _text_taken(self, text: str, positions: int) -> int:
        if text not in self._found:
            bits, at = 0, self._text.find(text)
            while at >= 0:
                bits |= 1 << at
                at = self._text.find(text, at + 1)
            self._found[text] = bits
        return (positions & self._found[text]) << len(text)

    def _takers(self, chars: frozenset[str]) -> int:
        """Positions whose character is one of `chars`; no `chars` stands for any but a newline."""
        if chars not in self._taking:
            bits = ("1" if (char in chars if chars else char != "\n") else "0" for char in reversed(self._text))
            self._taking[chars] = int("0" + "".join(bits), 2)
        return self._taking[chars]

    def _run(self, positions: int, takers: int) -> int:
        """All positions that any number of single moves leads to; the reach doubles in each turn."""
        enterable = takers << 1
        distance = 1
        while distance <= len(self._text):
            positions |= enterable & (positions << distance)
            enterable &= enterable << distance
            distance *= 2
        return positions

    def _ends(self) -> int:
        end = 1 << len(self._text)
        return end | end >> 1 if self._text.endswith("\n") else end

    def _borders(self, wanted: bool) -> int:
        if not self._text:
            return 0  # as `re` has it: neither a border nor none
        words = sum(1 << at for at, char in enumerate(self._text) if char == "_" or char.isalnum())
        borders = words ^ words << 1
        return borders if wanted else self._all & ~borders

    def _looking_ahead(self, step: Step, at: int, positions: int) -> int:
        return sum(
            1 << position
            for position in range(len(self._text) + 1)
            if positions >> position & 1 and self._looks_ahead(at, position) is (step.y == 1)
        )

    def _looks_ahead(self, at: int, position: int) -> bool:
        key = (at, position)
        if key not in self._ahead:
            self._ahead[key] = self.matches(at + 1, 1 << position, to_end=False)
        return self._ahead[key]
