"""How cost grows: with registered and with resident adapters, with the length of the prompt, and with the rank.

registered     16 rows at a time of a long queue of short answers, adapters by Zipf, at most 8 resident
resident       one row, whose adapter is one of many in the graph: time to the first token, and the pace behind it;
               alone, and after short prompts with all the other adapters
prompt         one row: time to the first token, and the pace behind it
rank           16 rows, one of 8 adapters each
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from bench.arrivals import zipf
from bench.batches import PROMPT_TOKENS, VOCABULARY, Case, case
from bench.part import Plan, Row
from bench.rounds import spreads
from bench.workload import Run, Server, base_linears, prompts, write_adapters

_RESIDENT = 8
_BATCH = 16
_ZIPF_RANK = 8  # of hundreds of adapters that lie on the disk
_ZIPF_TOKENS = 16
# As many as may wait. Of fewer the last ones, for adapters that nobody else uses, would weigh too much: no more than 8
# of them run together.
_QUEUE, _SHORT_QUEUE = 16 * _BATCH, 2 * _BATCH
_RESIDENTS, _SHORT_RESIDENTS = (1, 2, 4, 8, 16, 32), (1, 8)
_RESIDENT_PROMPT = 256
_OTHER_SEEDS = 1 << 20  # for prompts that stand in no cache
_LENGTHS, _SHORT_LENGTHS = (32, 128, 512, 1024, 2048, 4096), (32, 256)
_RANKS, _SHORT_RANKS = (4, 8, 16, 32, 64, 128), (8, 32)


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure along all axes."""
    return [*by_registered(model, plan), *by_resident(model, plan), *by_prompt(model, plan), *by_rank(model, plan)]


def by_registered(model: Path, plan: Plan) -> list[Row]:
    """Measure a queue whose adapters follow Zipf's law, against one of `_RESIDENT` registered adapters."""
    most = max(*plan.registered, _RESIDENT)
    adapters = write_adapters(plan.folder, base_linears(model), most, rank=_ZIPF_RANK)
    counts = [_RESIDENT, *(count for count in plan.registered if count != _RESIDENT)]
    with ExitStack() as stack:
        cases = {}
        for count in counts:
            some = dict(islice(adapters.items(), count))
            options = {"max_loras": _RESIDENT, "max_cpu_loras": count}
            server = stack.enter_context(Server(model, some, overrides={"max_num_seqs": _BATCH}, **options))
            cases[str(count)] = _queue(server, count, plan)
        found = spreads(plan.in_turn(cases))
    return [
        {"axis": "registered", "value": int(count), "case": "zipf", **found[count].columns("tokens_per_second")}
        for count in sorted(found, key=int)
    ]


def _queue(server: Server, count: int, plan: Plan) -> Callable[[int], float]:
    requests = _QUEUE if plan.long else _SHORT_QUEUE

    def run(number: int) -> float:
        names = [f"a{index}" for index in zipf(requests, count, seed=number)]
        asked = prompts(requests, PROMPT_TOKENS, vocabulary=VOCABULARY, seed=number)
        return server.run(asked, [server.use(name) for name in names], max_tokens=_ZIPF_TOKENS).rate

    return run


def by_resident(model: Path, plan: Plan) -> list[Row]:
    """Measure a prompt whose adapter stands in the graph among others, which nobody uses, or short prompts do."""
    counts = _RESIDENTS if plan.long else _SHORT_RESIDENTS
    adapters = write_adapters(plan.folder, base_linears(model), max(counts))
    with ExitStack() as stack:
        cases: dict[str, Case] = {}
        for count in counts:
            some = dict(islice(adapters.items(), count))
            server = stack.enter_context(Server(model, some, max_loras=count))
            case(server, list(some), tokens=1)(0)  # brings all of them into the graph
            cases[f"{count} one in use"] = case(server, ["a0"], plan.tokens, length=_RESIDENT_PROMPT)
            if count > 1:
                cases[f"{count} all in use"] = _beside_others(server, list(some), plan)
        found = plan.in_turn(cases)
    rows: list[Row] = []
    for name, runs in found.items():
        residents, used = name.split(" ", 1)
        rows.append({"axis": "resident", "value": int(residents), "case": used, **_latencies(runs)})
    return rows


def _beside_others(server: Server, aliases: Sequence[str], plan: Plan) -> Case:
    uses = [server.use(alias) for alias in aliases]

    def run(number: int) -> Run:
        others = prompts(len(uses) - 1, PROMPT_TOKENS, vocabulary=VOCABULARY, seed=number)
        (long,) = prompts(1, _RESIDENT_PROMPT, vocabulary=VOCABULARY, seed=number + _OTHER_SEEDS)
        return server.run([*others, long], uses, max_tokens=plan.tokens)

    return run


def by_prompt(model: Path, plan: Plan) -> list[Row]:
    """Measure prompts of growing length, plain and with an adapter."""
    adapters = write_adapters(plan.folder, base_linears(model), 1)
    rows: list[Row] = []
    with Server(model) as plain, Server(model, adapters, max_loras=1) as adapted:
        fitting = plain.model.engine.max_model_len - plan.tokens
        for length in _LENGTHS if plan.long else _SHORT_LENGTHS:
            if length > fitting:
                continue
            cases = {
                "plain": case(plain, [None], plan.tokens, length=length),
                "one adapter": case(adapted, ["a0"], plan.tokens, length=length),
            }
            for name, runs in plan.in_turn(cases).items():
                rows.append({"axis": "prompt", "value": length, "case": name, **_latencies(runs)})
    return rows


def _latencies(runs: list[Run]) -> Row:
    return {
        "ttft_ms": statistics.median(run.first_token_times[-1] for run in runs) * 1e3,
        "step_ms": statistics.median(seconds for run in runs for seconds in run.intervals) * 1e3,
    }


def by_rank(model: Path, plan: Plan) -> list[Row]:
    """Measure adapters of growing rank."""
    base = base_linears(model)
    names = [f"a{index % _RESIDENT}" for index in range(_BATCH)]
    with ExitStack() as stack:
        cases = {"0": _rate(stack.enter_context(Server(model)), [None] * _BATCH, plan)}
        for rank in _RANKS if plan.long else _SHORT_RANKS:
            adapters = write_adapters(plan.folder, base, _RESIDENT, rank=rank)
            server = Server(model, adapters, max_loras=_RESIDENT, max_lora_rank=rank)
            cases[str(rank)] = _rate(stack.enter_context(server), names, plan)
        found = spreads(plan.in_turn(cases))
    return [
        {"axis": "rank", "value": int(rank), "case": "8 mixed", **spread.columns("tokens_per_second")}
        for rank, spread in found.items()
    ]


def _rate(server: Server, aliases: Sequence[str | None], plan: Plan) -> Callable[[int], float]:
    run = case(server, aliases, plan.tokens)
    return lambda number: run(number).rate
