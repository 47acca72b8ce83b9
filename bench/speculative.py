"""What guessing ahead brings: tokens per second with it against those without it, and how often guesses prove right.

Texts: `repeat` (the answer copies the prompt's lines with small edits), `extract` (it quotes the prompt), `summary` and
`story` (free text, in which little can be looked up), `random` (a sampled text at a high temperature: nothing can).
Each text is written by the model itself, greedily but for `random`; batches hold it several times with other lines.

python -m bench.speculative [--model smollm2] [--draft DIR] [--batches 1,4,8] [--tokens 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.models import MODELS
from bench.results import write_results
from bench.rounds import Spread, in_turn, spreads
from bench.workload import Server
from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import SpeculationOptions

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_CODE = "\n".join(
    f"def get_{field}(self) -> str:\n    # return the {field} of this {{0}}\n    return self._{field}\n"
    for field in ("name", "address", "city", "country", "phone", "mail", "number", "state")
)
_STORY = (
    "{0} lived in a small house at the end of the village. Every morning {0} walked to the river to count the boats. "
    "One day there was a boat with a red sail, and nobody knew where it came from. {0} asked the miller, the baker and "
    "the teacher, but the boat with the red sail had never been seen before."
)
_TASKS = {
    "repeat": "Copy this code, with the class Person renamed to {0}Person.\n\n" + _CODE,
    "extract": "Quote all sentences of this text that name a colour, word by word, one a line.\n\n" + _STORY,
    "summary": "Summarise this text in your own words.\n\n" + _STORY,
    "story": "Write a long story about {0} and the sea.",
    "random": "Write a long story about {0} and the sea.",
}
_NUMBERS = itertools.count()


def requests(server: Server, task: str, batch: int, tokens: int) -> list[GenerationRequest]:
    """Return the requests of one batch."""
    template = server.model.chat_template
    assert template, "the models that are measured have chat templates"
    sampling = SamplingParams(temperature=2.0 if task == "random" else 0.0, seed=7, max_tokens=tokens, ignore_eos=True)
    made = []
    for index in range(batch):
        words = _TASKS[task].replace("{0}", _NAMES[index % len(_NAMES)])
        rendered = template.render([{"role": "user", "content": words}], add_generation_prompt=True)
        token_ids = tuple(server.model.tokenizer.encode(rendered, add_special_tokens=False))
        made.append(GenerationRequest(f"speculative-{next(_NUMBERS)}", token_ids, sampling))
    return made


def measure(
    model: Path, methods: dict[str, SpeculationOptions], *, batch: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Run every task without and with each method, in turn; return rates and the shares of guesses that were right."""
    servers = {"off": Server(model)}
    servers |= {name: Server(model, overrides={"speculation": options}) for name, options in methods.items()}
    found: dict[str, Any] = {}
    for task in _TASKS:
        cases: dict[str, Callable[[int], float]] = {}
        for name, server in servers.items():
            cases[name] = _case(server, task, batch, tokens)
        before = {name: _counts(server) for name, server in servers.items()}
        summary = spreads(in_turn(cases, rounds))
        found[task] = {}
        for name, rate in summary.items():
            drafted, accepted = (
                after - first for after, first in zip(_counts(servers[name]), before[name], strict=True)
            )
            found[task][name] = {**asdict(rate), "drafted": drafted, "accepted": accepted}
            print(_line(task, name, rate, drafted, accepted))
    for server in servers.values():
        server.close()
    return {"model": model.name, "batch": batch, "tokens": tokens, "tasks": found}


def _case(server: Server, task: str, batch: int, tokens: int) -> Callable[[int], float]:
    def run(_: int) -> float:
        return server.answer(requests(server, task, batch, tokens)).rate

    return run


def _counts(server: Server) -> tuple[int, int]:
    stats = server.model.engine.stats().speculation
    return (stats.draft_tokens, stats.accepted_tokens) if stats else (0, 0)


def _line(task: str, name: str, rate: Spread, drafted: int, accepted: int) -> str:
    share = f", {accepted / drafted:5.1%} of {drafted} guesses right" if drafted else ""
    return f"{task:8s} {name:12s} {rate.median:8.1f} tokens/s  {rate.ratio:6.3f} of off{share}"


def main() -> None:
    """Measure the batches one after another."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculative", description=__doc__)
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--draft", type=Path, help="folder of a draft model, to measure that too")
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    methods = {"lookup": SpeculationOptions()}
    if options.draft:
        methods["draft"] = SpeculationOptions(draft_models_path=str(options.draft))
    for batch in map(int, options.batches.split(",")):
        print(f"\n{options.model}, batch {batch}, {options.tokens} tokens each")
        model = MODELS[options.model]()
        results = measure(model, methods, batch=batch, tokens=options.tokens, rounds=options.rounds)
        print(write_results(f"speculative-{options.model}-b{batch}", results))


if __name__ == "__main__":
    main()
