"""TokenConstraint: what a text must look like, from the words of a client to one matcher per sequence.

    ConstraintSpec ──compiled for one tokenizer──► TokenConstraint ──► TokenMatcher, one for each sequence

Owns the names; the engine compiles (`engine/structured.py`), the sampler asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ovms_lora.core.errors import OvmsLoraError

BoolArray = npt.NDArray[np.bool_]


class ConstraintKind(StrEnum):
    """The languages in which a constraint is written."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class ConstraintSpec:
    """What the whole text must match.

    `source` is a JSON schema as JSON text, a regular expression, a context-free grammar (EBNF or Lark), a tuple of
    the choices, or the empty string for any JSON object. Equal specs compile to equal constraints.
    """

    kind: ConstraintKind
    source: str | tuple[str, ...] = ""


class TokenMatcher(Protocol):
    """How far one sequence has come in its constraint. It lives as long as the sequence, preempted or not."""

    def allowed(self, width: int) -> BoolArray:
        """Return which of the `width` tokens of the vocabulary may come next; EOS only where the text may end.

        None may when the matcher has failed.
        """

    def accept(self, token_id: int) -> None:
        """Go on with a token that was allowed."""

    def fork(self) -> TokenMatcher:
        """Return a matcher for another sequence that is as far and goes on by itself."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but EOS may follow."""

    @property
    def failure(self) -> OvmsLoraError | None:
        """Why the matcher cannot go on, for instance because the text has become too ambiguous to follow."""


class TokenConstraint(Protocol):
    """A compiled constraint; it is shared and never changes."""

    def matcher(self) -> TokenMatcher:
        """Return a matcher at the beginning of the text."""
