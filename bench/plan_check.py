"""Is `ovms-lora plan` right? Three real replicas on Ray Serve under Poisson traffic, and their simulation.

python -m bench.plan_check [--model smollm2] [--seconds 400] [--load 0.15]

The replicas of `ovms-lora ray` have one thread each, and adapters are popular by Zipf's law. The profile is measured in
the same run, in turns with the traffic: on an engine of its own, while the replicas have two thirds as much to do as in
the traffic. Where replicas share cores each is slower than alone, and machines change their speed. Then the very
requests that were served are simulated. More than eight at once in one replica, which the simulation does not know,
come up only where the load is higher. The first two turns fill empty caches and are not compared.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.models import CACHE, MODELS, tiny
from bench.replica_process import ReplicaProcess, ReplicaSetup
from bench.replica_profile import Extent, mean_profile, write_adapters
from bench.results import write_results
from bench.served import running, write_config
from bench.streams import Ask, stream_all, streaming
from bench.timed_engine import Asked
from ovms_lora.scale.plan.outcome import Outcome
from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.replica import Record, ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.simulation import Routing, Simulated, simulate
from ovms_lora.scale.plan.token_lengths import TokenLengths
from ovms_lora.scale.plan.workload import BASE, Traffic, Workload

_REPLICAS = 3
_PROCESSORS = 0.5  # that Ray reserves for each: three go on two cores, and each computes in one thread
_ADAPTERS = 24
_RANK = 8
_LIMITS = ReplicaLimits(max_loras=4, max_cpu_loras=8, total_rank=4 * _RANK, max_num_seqs=8, max_ongoing_requests=8)
_EXTENT = Extent(max_rows=8, max_adapters=4, rank=_RANK, tokens=32, rounds=1)
_TURNS = 10
_WARM_TURNS = 2  # as many requests as the planner leaves out
_LONGEST_SECONDS = 600.0  # that a profile takes
_SEED_BESIDE = 1_000_003
_ALONE = 12
_IDLE_SECONDS = 0.2
_TOLERANCE = 0.25

_BROUGHT_IN = "ovms_lora_brought_in_total"
_AT_WORK = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Fleet:
    """The replicas, behind one address."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rng = np.random.default_rng()  # prompts that no prefix cache has seen

    @property
    def url(self) -> str:
        """Where completions are asked for."""
        return f"{self._url}/v1"

    def asks(self, traffic: Traffic, requests: range) -> list[Ask]:
        """Return some of the traffic, from its first request on."""
        begin = traffic.arrivals[requests.start]
        return [
            Ask(
                traffic.arrivals[number] - begin,
                self._body(traffic.adapters[number], traffic.prompts[number], traffic.outputs[number]),
            )
            for number in requests
        ]

    def serve(self, traffic: Traffic, requests: range, record: Record) -> int:
        """Serve some of the traffic and note its times; return how many adapters were brought into a graph for it."""
        before, asks = self._sum(_BROUGHT_IN), self.asks(traffic, requests)
        for number, ask, stream in zip(requests, asks, stream_all(self.url, asks), strict=True):
            if stream.status != 200:
                raise SystemExit(f"error: a request was answered with status {stream.status}")
            record.first[number] = traffic.arrivals[number] + stream.times[0] - ask.at
            record.done[number] = traffic.arrivals[number] + stream.times[-1] - ask.at
        return self._sum(_BROUGHT_IN) - before

    def first_token(self, tokens: int) -> float:
        """Return the seconds to the first token of a request alone."""
        (stream,) = stream_all(self.url, [Ask(0.0, self._body(BASE, tokens, 1))])
        return stream.ttft

    def wait_until_idle(self) -> None:
        """Return when nothing runs."""
        while self._sum(*_AT_WORK):
            time.sleep(_IDLE_SECONDS)

    def _body(self, adapter: int, prompt: int, output: int) -> dict[str, object]:
        return {
            "model": "base" if adapter == BASE else f"a{adapter}",
            "prompt": self._rng.integers(10, 250, prompt).tolist(),
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,  # an event for each token, also for one that is no text yet
        }

    def _sum(self, *names: str) -> int:
        """Return the sum over all replicas. Raises SystemExit when not all of them tell theirs."""
        answer = httpx.get(f"{self._url}/metrics", timeout=60, trust_env=False).raise_for_status()
        families = text_string_to_metric_families(answer.text)
        samples = [sample for family in families for sample in family.samples if sample.name in names]
        if len({sample.labels["replica"] for sample in samples}) != _REPLICAS:
            raise SystemExit("error: not all replicas tell their metrics")
        return int(sum(sample.value for sample in samples))


def seconds_of_one(replica: ReplicaProcess, workload: Workload) -> float:
    """Return how long a replica alone takes for a request of mean length, when nothing disturbs it."""
    prompt, output = round(workload.prompts.mean), round(workload.outputs.mean)
    answers = [replica.ask(_asked(prompt, "a0", output)) for _ in range(_ALONE)]
    return min(answer.last - answer.begin for answer in answers)


def overhead(fleet: Fleet, replica: ReplicaProcess, tokens: int) -> float:
    """Return what HTTP and routing add to the first token of a request, when nothing else runs."""
    through = [fleet.first_token(tokens) for _ in range(_ALONE)]
    answers = [replica.ask(_asked(tokens, None, 1)) for _ in range(_ALONE)]
    return max(0.0, statistics.median(through) - statistics.median(answer.first - answer.begin for answer in answers))


def _asked(prompt: int, adapter: str | None, output: int) -> Asked:
    ids = tuple(np.random.default_rng().integers(10, 250, prompt).tolist())
    return Asked("alone", ids, adapter, output)


def numbers(outcome: Outcome, hits: float) -> dict[str, float]:
    """Return what is compared, by name; `hits` is the share of the requests whose adapter was in the graph."""
    return {
        "tokens/s": outcome.tokens_per_second,
        "adapter in the graph": hits,
        "first token p50": outcome.ttft.p50,
        "first token p95": outcome.ttft.p95,
        "whole answer p50": outcome.e2e.p50,
        "whole answer p95": outcome.e2e.p95,
    }


def check(model: Path, folder: Path, *, seconds: float, load: float, seed: int) -> dict[str, object]:
    """Measure, simulate, print; return all numbers."""
    adapters = write_adapters(folder, model, _ADAPTERS, rank=_RANK)
    config = write_config(folder, model, adapters, max_loras=_LIMITS.max_loras, max_cpu_loras=_LIMITS.max_cpu_loras)
    flags = ("--config_path", str(config), "--num_replicas", str(_REPLICAS), "--num_cpus", str(_PROCESSORS))
    room = ("--target_ongoing_requests", str(_LIMITS.max_ongoing_requests))
    measured_apart = ReplicaSetup(model, adapters, _LIMITS)
    with running("ray", *flags, *room) as ray, closing(ReplicaProcess(measured_apart)) as replica:
        fleet = Fleet(ray.url)
        one = seconds_of_one(replica, _workload(1.0))
        rate = load * _REPLICAS / one
        traffic = _workload(rate).draw(round(rate * seconds), seed)
        _say(f"{len(traffic.arrivals)} requests, {rate:.2f} a second, on {_REPLICAS} replicas of one thread")
        record, turns = Record.of(len(traffic.arrivals)), _turns(len(traffic.arrivals))
        brought_in, profiles = [], []
        for requests in turns:
            profiles.append(measured(fleet, replica, rate * (_REPLICAS - 1) / _REPLICAS))
            brought_in.append(fleet.serve(traffic, requests, record))
            _say(f"{requests.stop} are served")
    profile = mean_profile(profiles)
    simulated = simulate(profile, _LIMITS, traffic, replicas=_REPLICAS, routing=Routing.AFFINITY, seed=seed)
    served = Simulated(traffic, record, [0.0] * _REPLICAS, queued=0)  # how busy they were is not known
    real, predicted = (
        Outcome.of(each, Routing.AFFINITY, capacity=_REPLICAS * _LIMITS.max_ongoing_requests, overhead=added)
        for each, added in ((served, 0.0), (simulated, profile.overhead_seconds))
    )
    with_adapter = sum(adapter != BASE for adapter in traffic.adapters[turns[_WARM_TURNS].start :])
    found = numbers(real, 1 - sum(brought_in[_WARM_TURNS:]) / with_adapter)
    expected = numbers(predicted, predicted.hits.resident)
    for name, value in found.items():
        print(f"{name:22s} measured {value:8.3f}  predicted {expected[name]:8.3f}  {expected[name] / value - 1:+6.1%}")
    return {
        "model": model.name,
        "rate": rate,
        "requests": len(traffic.arrivals),
        "rows": {name: {"measured": value, "predicted": expected[name]} for name, value in found.items()},
        "profile": profile.model_dump(mode="json"),
    }


def measured(fleet: Fleet, replica: ReplicaProcess, rate: float) -> ReplicaProfile:
    """Return the profile of an engine beside traffic at the replicas, and what Serve adds to a first token."""
    added = overhead(fleet, replica, round(_workload(rate).prompts.mean))
    beside = _workload(rate).draw(round(rate * _LONGEST_SECONDS), seed=_SEED_BESIDE)
    with streaming(fleet.url, fleet.asks(beside, range(len(beside.arrivals)))):
        profile = replica.measure(_EXTENT)
    fleet.wait_until_idle()
    return profile.model_copy(update={"overhead_seconds": added})


def _workload(rate: float) -> Workload:
    popularity = Popularity.zipf(_ADAPTERS, 1.0, rank=_RANK)
    return Workload(rate, popularity, TokenLengths.parse("", "16-64"), TokenLengths.parse("", "8-56"), base_share=0.1)


def _turns(requests: int) -> list[range]:
    bounds = [requests * turn // _TURNS for turn in range(_TURNS + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def _tiny() -> Path:
    """Return a model whose steps take a millisecond or two, for a quick look: what they wait for each other counts."""
    folder = CACHE / "tiny" / "base"
    return folder if folder.is_dir() else tiny(folder.parent)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Check, write the result, and return 1 when a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"a model folder, or tiny, {', '.join(MODELS)}")
    parser.add_argument("--seconds", type=float, default=400.0, help="of traffic")
    parser.add_argument("--load", type=float, default=0.15, help="of what replicas do that answer one at a time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = {"tiny": _tiny, **MODELS}
    model = known[options.model]() if options.model in known else Path(options.model)
    with tempfile.TemporaryDirectory() as folder:
        found = check(model, Path(folder), seconds=options.seconds, load=options.load, seed=options.seed)
    print(write_results(f"plan_check-{options.model}", found))
    rows = found["rows"]
    assert isinstance(rows, dict), "by name"
    wrong = [name for name, row in rows.items() if abs(row["predicted"] / row["measured"] - 1) > _TOLERANCE]
    if wrong:
        print(f"off by more than {_TOLERANCE:.0%}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
