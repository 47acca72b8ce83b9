"""What a parser gives out: pieces of reasoning, content and tool calls, in the order in which they came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments, JSON as the model wrote it, of the call that began last."""

    text: str


Delta = Content | Reasoning | CallStart | Arguments
