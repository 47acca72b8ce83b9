"""Reasoning in front of the answer: `<think>…</think>`, as Qwen3 and DeepSeek-R1 write it.

Reasoning comes at the beginning or not at all. A template may have written the opening tag already.
"""

from __future__ import annotations

from ovms_lora.engine.output_parsers.deltas import Reasoning
from ovms_lora.engine.output_parsers.parser import Grammar, Steps
from ovms_lora.engine.output_parsers.reading import accept, pass_until
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("<think>", "</think>")
_OPEN, _CLOSE = MARKERS


def qwen3(answer: Grammar, prompt: str) -> Grammar:
    """Reasoning is told by its tag, in the text or at the end of the prompt; `answer` reads what follows it."""
    return _thinking(answer, begun=prompt.rstrip().endswith(_OPEN))


def deepseek_r1(answer: Grammar, prompt: str) -> Grammar:
    """As `qwen3`, but a text without the opening tag is reasoning too, unless the prompt has closed it."""
    return _thinking(answer, begun=not prompt.rstrip().endswith(_CLOSE))


def _thinking(answer: Grammar, *, begun: bool) -> Grammar:
    def grammar(source: TextSource) -> Steps[None]:
        if (yield from accept(source, _OPEN)) or begun:
            yield from pass_until(source, _CLOSE, Reasoning)
        yield from answer(source)

    return grammar
