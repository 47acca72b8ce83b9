"""ovms-lora and other engines on the same weights, prompts and number of tokens, in turn within each round.

Each engine is a process of its own that stands still while another one works: one that is plain, and one with eight
adapters. Those that cannot mix adapters do one after another. Which ones take part is decided by what is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.batches import PROMPT_TOKENS, VOCABULARY
from bench.engines.job import Answer, Job, Setup
from bench.engines.process import ENVIRONMENTS, EngineProcess
from bench.models import embedded_gguf, source_of
from bench.part import Plan, Row
from bench.rounds import spreads
from bench.workload import base_linears, prompts, write_adapters

OWN = "ovms-lora"
_NEEDS = {OWN: "openvino", "genai": "openvino_genai", "llama.cpp": "llama_cpp", "vllm": "vllm", "peft": "peft"}
_SLOW = "peft"  # an order of magnitude slower: in the short form it has one size of batch
_READS_SOURCE = {"llama.cpp", "vllm", "peft"}
_ADAPTERS = 8
_BATCHES = (1, 8, 16)

_Engines = Mapping[str, EngineProcess]


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure all engines that are installed."""
    adapters = write_adapters(plan.folder, base_linears(model), _ADAPTERS)
    setup = Setup(model, {}, plan.folder, max(_BATCHES))
    rows: list[Row] = []
    with ExitStack() as stack:
        plain = {name: stack.enter_context(_started(name, setup)) for name in installed()}
        for batch in _BATCHES:
            taking_part = _without_slow(plain, keep=plan.long or batch == _ADAPTERS)
            rows += _compare("plain", [None] * batch, taking_part, plan)
    setup = replace(setup, adapters=adapters)
    with ExitStack() as stack:
        quick_enough = [name for name in installed() if plan.long or name != _SLOW]
        mixed = {name: stack.enter_context(_started(name, setup)) for name in quick_enough}
        for batch in _BATCHES[1:]:
            names = [f"a{index % _ADAPTERS}" for index in range(batch)]
            rows += _compare(f"{_ADAPTERS} adapters", names, mixed, plan)
    return rows


def installed() -> tuple[str, ...]:
    """Return the engines that can run here, ours first."""
    return tuple(name for name in _NEEDS if _is_installed(name))


def _is_installed(name: str) -> bool:
    if name in ENVIRONMENTS:
        return (ENVIRONMENTS[name] / ".ready").exists()
    return importlib.util.find_spec(_NEEDS[name]) is not None


def _without_slow(engines: _Engines, *, keep: bool) -> _Engines:
    return {name: engine for name, engine in engines.items() if keep or name != _SLOW}


def _started(name: str, setup: Setup) -> EngineProcess:
    if name in _READS_SOURCE:
        setup = replace(setup, source=source_of(setup.model), vocabulary=embedded_gguf())
    return EngineProcess(name, setup)


def _compare(case: str, adapters: Sequence[str | None], engines: _Engines, plan: Plan) -> list[Row]:
    def asking(engine: EngineProcess) -> Callable[[int], Answer]:
        def ask(number: int) -> Answer:
            asked = prompts(len(adapters), PROMPT_TOKENS, vocabulary=VOCABULARY, seed=number)
            return engine.run(Job(asked, list(adapters), plan.tokens))

        return ask

    found = plan.in_turn({name: asking(engine) for name, engine in engines.items()})
    rates = spreads({name: [answer.rate for answer in answers] for name, answers in found.items()})
    return [
        {
            "case": case,
            "batch": len(adapters),
            "engine": name,
            **rates[name].columns("tokens_per_second"),
            "same_first_tokens": _agreement(found[OWN], answers),
        }
        for name, answers in found.items()
    ]


def _agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Return the share of answers that begin with the same token: whether the same work was done."""
    pairs = [
        (own, other) for a, b in zip(ours, theirs, strict=True) for own, other in zip(a.tokens, b.tokens, strict=True)
    ]
    return sum(own[0] == other[0] for own, other in pairs) / len(pairs)
