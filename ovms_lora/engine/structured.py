"""ConstraintCompiler: turns what a text must look like into matchers over the tokens of one model.

    ConstraintSpec ──grammar──► llguidance, on a deep stack ──► CompiledConstraint, kept ──copy──► GrammarMatcher

Compiling takes up to two seconds for a source at its bounds, with the GIL released: call it from a worker thread. A
matcher belongs to the engine thread. Owns llguidance's limits and the cache; knows nothing of fields and dialects.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ovms_lora.core.constraint import BoolArray, ConstraintKind, ConstraintSpec
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.engine.grammar import MAX_SCHEMA_BYTES, grammar_text
from ovms_lora.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT = 64  # compiled constraints
_KEPT_BYTES = 4 * 1024 * 1024  # of their sources
_MESSAGE_CHARACTERS = 300
# llguidance recurses along nesting and references: about 7 KB for each level that `grammar.MAX_LEVELS` counts.
_STACK_BYTES = 128 * 1024 * 1024
_STACK_SIZE = threading.Lock()  # the size of new stacks is a setting of the whole process


def _limits(*, max_grammar_size: int, initial_lexer_fuel: int) -> LLParserLimits:
    """Return llguidance's limits: the symbols of a grammar, the nodes of its regular expressions, and each step."""
    return LLParserLimits(
        max_grammar_size=max_grammar_size,
        initial_lexer_fuel=initial_lexer_fuel,
        # Some 10 ms for one sequence; ordinary schemas stay far below.
        step_max_items=20_000,
        step_lexer_fuel=100_000,
        max_items_in_row=8_000,
        # Of half a KB, in each constraint; ordinary schemas have hundreds, a `maxLength` as many as it is long.
        max_lexer_states=20_000,
        verbose_errors=False,
    )


_SCHEMA_LIMITS = _limits(max_grammar_size=200_000, initial_lexer_fuel=400_000)
# A few rules or terminals that name each other twice stand for thousands, and cost the square of their number.
# Schemas cannot say such.
_GRAMMAR_LIMITS = _limits(max_grammar_size=5_000, initial_lexer_fuel=30_000)
_WRITTEN_AS_GRAMMAR = frozenset({ConstraintKind.GRAMMAR, ConstraintKind.REGEX})


class GrammarMatcher:
    """One sequence's way through a compiled constraint."""

    def __init__(self, constraint: CompiledConstraint, matcher: LLMatcher) -> None:
        self._constraint = constraint
        self._matcher = matcher

    def allowed(self, width: int) -> BoolArray:
        """Return which of the `width` tokens of the vocabulary may come next; none after a failure."""
        packed = np.frombuffer(b"" if self._matcher.is_error() else self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self._constraint.spent = True
            return np.zeros(width, np.bool_)
        allowed = np.unpackbits(packed, count=min(width, 8 * len(packed)), bitorder="little").view(np.bool_)
        # A model may have more logits than its tokenizer has tokens.
        return np.pad(allowed, (0, width - len(allowed)))

    def accept(self, token_id: int) -> None:
        """Go on with a token that was allowed."""
        self._matcher.consume_token(token_id)

    def fork(self) -> GrammarMatcher:
        """Return a matcher for another sequence that is as far and goes on by itself; takes microseconds."""
        return GrammarMatcher(self._constraint, self._matcher.deep_copy())

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but EOS may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def failure(self) -> InvalidFieldError | None:
        """Why the matcher cannot go on."""
        if not self._matcher.is_error():
            return None
        return InvalidFieldError(f"the text cannot follow its constraint any more: {_reason(self._matcher)}")


class CompiledConstraint:
    """A constraint for the tokens of one model.

    Its matchers share a lexer that grows with their texts. `spent` once that, or a text, was too large for one of them.
    """

    def __init__(self, start: LLMatcher) -> None:
        self._start = start
        self.spent = False

    def matcher(self) -> GrammarMatcher:
        """Return a matcher at the beginning of the text; takes microseconds."""
        return GrammarMatcher(self, self._start.deep_copy())


class ConstraintCompiler:
    """Compiles for one model, and keeps the constraints that were used last; from any thread.

    Making one takes about 0.3 s per 50,000 tokens and holds the GIL: do it while the model is loaded.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> None:
        eos = [token for token in eos_token_ids if token < tokenizer.vocab_size]
        self._tokenizer: LLTokenizer | None = None
        try:
            self._tokenizer = LLTokenizer(tokenizer.to_json(), eos_token=eos or None)
        except ValueError as error:
            log.warning("structured output is not available, because of the tokenizer: %s", error)
        self._kept: OrderedDict[ConstraintSpec, CompiledConstraint] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def kept(self, spec: ConstraintSpec) -> CompiledConstraint | None:
        """Return the constraint for a spec if it is there already; takes no time."""
        with self._lock:
            kept = self._kept.get(spec)
            if kept is None or kept.spent:
                return None
            self._kept.move_to_end(spec)
            return kept

    def compile(self, spec: ConstraintSpec, *, param: str, schema_bytes: int = MAX_SCHEMA_BYTES) -> CompiledConstraint:
        """Return the constraint for a spec. Raises InvalidFieldError with the reason, in the name of `param`."""
        kept = self.kept(spec)
        if kept:
            return kept
        if self._tokenizer is None:
            raise InvalidFieldError(f"{param} is not supported with the tokenizer of this model", param=param)
        try:
            compiled = CompiledConstraint(_compiled(spec, self._tokenizer, schema_bytes))
        except ValueError as error:
            raise InvalidFieldError(f"{param} does not compile: {error}", param=param) from error
        self._keep(spec, compiled)
        return compiled

    def _keep(self, spec: ConstraintSpec, compiled: CompiledConstraint) -> None:
        with self._lock:
            if spec not in self._kept:
                self._kept_bytes += _size(spec)
            self._kept[spec] = compiled
            self._kept.move_to_end(spec)
            while len(self._kept) > _KEPT or self._kept_bytes > _KEPT_BYTES:
                dropped, _ = self._kept.popitem(last=False)
                self._kept_bytes -= _size(dropped)


def _size(spec: ConstraintSpec) -> int:
    return len(spec.source) if isinstance(spec.source, str) else sum(map(len, spec.source))


def _compiled(spec: ConstraintSpec, tokenizer: LLTokenizer, schema_bytes: int) -> LLMatcher:
    """Return a matcher at the beginning. Raises ValueError with the reason in one line."""
    limits = _GRAMMAR_LIMITS if spec.kind in _WRITTEN_AS_GRAMMAR else _SCHEMA_LIMITS

    def build() -> LLMatcher:
        matcher = LLMatcher(tokenizer, grammar_text(spec, schema_bytes=schema_bytes), log_level=0, limits=limits)
        if not matcher.is_error():
            # The first mask is the dearest, and shows what is too complex or can match no text at all. It stays in
            # the lexer that all copies begin with.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        return matcher

    return _on_deep_stack(build)


def _reason(matcher: LLMatcher) -> str:
    """Return the cause out of llguidance's message, which may quote the whole grammar."""
    message = matcher.get_error()
    if "NoExtensionBias" in message or matcher.stop_reason() == "NoExtensionBias":
        return "no text matches it"
    regex_error = message.rpartition("\nerror: ")[2] if "\nerror: " in message else message
    line = regex_error.strip().split("\n", 1)[0].strip()
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + "…"


def _on_deep_stack(work: Callable[[], T]) -> T:
    """Call `work` in a thread whose stack holds the deepest recursion that a source within its bounds can cause."""
    with ThreadPoolExecutor(1, thread_name_prefix="grammar") as pool:
        with _STACK_SIZE:
            before = threading.stack_size(_STACK_BYTES)
            try:
                result = pool.submit(work)
            finally:
                threading.stack_size(before)
        return result.result()
