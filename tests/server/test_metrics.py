"""Contract section 9: every metric is there, has its labels, and moves; labels hold known names only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ovms_lora.server.options import ServerOptions
from tests.fakes import FakeRunner
from tests.server.serving import FakeModels, Served, serving, write_adapters, write_lora_config
from tests.server.test_faults import until

pytestmark = pytest.mark.anyio

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

OVMS = {"api", "interface", "method", "name"}
# Name, labels, and whether it has grown after some requests of every kind (gauges are back where they were).
NAMES: list[tuple[str, set[str], bool]] = [
    ("ovms_requests_accepted", OVMS, True),
    ("ovms_requests_rejected", OVMS, True),
    ("ovms_responses", OVMS, True),
    ("ovms_graph_error", OVMS, True),
    ("ovms_current_graphs", {"name"}, False),
    ("ovms_graph_processing_time_us_count", {"method", "name"}, True),
    ("ovms_graph_processing_time_us_sum", {"method", "name"}, True),
    ("vllm:num_requests_running", {"model_name"}, False),
    ("vllm:num_requests_waiting", {"model_name"}, False),
    ("vllm:kv_cache_usage_perc", {"model_name"}, False),
    ("vllm:prompt_tokens_total", {"model_name"}, True),
    ("vllm:generation_tokens_total", {"model_name"}, True),
    ("vllm:time_to_first_token_seconds_count", {"model_name"}, True),
    ("vllm:inter_token_latency_seconds_count", {"model_name"}, True),
    ("vllm:e2e_request_latency_seconds_count", {"model_name"}, True),
    ("vllm:prefix_cache_hits_total", {"model_name"}, True),
    ("vllm:prefix_cache_queries_total", {"model_name"}, True),
    ("vllm:lora_requests_info", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}, True),
    ("ovms_lora_requests_total", {"adapter"}, True),
    ("ovms_lora_tokens_total", {"adapter", "kind"}, True),
    ("ovms_lora_resident", {"adapter"}, True),
    ("ovms_lora_brought_in_total", {"model_name"}, True),
    ("ovms_lora_loads_total", {"adapter", "result"}, True),
    ("ovms_lora_load_seconds_count", set(), True),
]


async def samples(served: Served) -> Samples:
    text = (await served.client.get("/metrics")).text
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


async def overfill(served: Served) -> None:
    """Have one call run, one fill the queue of four, and one refused."""
    gate, engine = served.models.runners["base"].gate, served.state.registry.resolve("base").served.model.engine

    def ask(prompts: int) -> asyncio.Task[Any]:
        return asyncio.create_task(served.post("/v1/completions", model="base", prompt=["a"] * prompts, max_tokens=1))

    gate.clear()
    answers = [ask(1)]
    await until(lambda: engine.stats().running == 1)
    answers.append(ask(4))
    await until(lambda: engine.stats().waiting == 4)
    assert (await ask(1)).status_code == 429
    gate.set()
    assert [(await answer).status_code for answer in answers] == [200, 200]


async def work(served: Served) -> None:
    """Send requests of every kind: answered, streamed, refused, rejected, with loaded and unknown names."""
    prompt = "the same prompt, longer than a block"
    for model in ("base", "base", "sql", "mix", "base:later"):
        await served.text("/v3/completions", model=model, prompt=prompt, max_tokens=4)
        await served.text("/v1/completions", model=model, prompt=prompt, max_tokens=4, stream=True)
    await served.post("/v3/completions", model="base", prompt="")
    await overfill(served)
    for model in ("stranger", "base:stranger", "../stranger"):
        await served.post("/v1/completions", model=model, prompt="a")
        await served.post("/v3/completions", model="base", lora=[{"alias": model}], prompt="a")
    await served.client.post("/v1/load_lora_adapter", json={"lora_name": "stranger", "lora_path": "/nowhere"})


@pytest.fixture(scope="module")
async def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, Samples]:
    """The samples of a server before and after it has worked."""
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder / "found", "later")
    path = write_lora_config(folder, lora_options={"dynamic_lora_loading_path": "found"})
    models = FakeModels(max_waiting=4, runner=lambda: FakeRunner(num_blocks=1024))
    options = ServerOptions(poll_seconds=0, runtime_lora_updating=True, lora_path_prefixes=(Path(folder),))
    async with serving(models, source=path, options=options) as served:
        before = await samples(served)
        await work(served)
        await served.settled()
        return before, await samples(served)


def total(samples: Samples, name: str) -> float:
    return sum(value for (sample, _), value in samples.items() if sample == name)


@pytest.mark.parametrize(("name", "labels", "grows"), NAMES, ids=[row[0] for row in NAMES])
async def test_a_metric_of_the_contract(
    measured: tuple[Samples, Samples], name: str, labels: set[str], grows: bool
) -> None:
    before, after = measured
    found = [dict(of) for sample, of in after if sample == name]
    assert found
    assert all(set(of) == labels for of in found)
    assert (total(after, name) > total(before, name)) == grows


async def test_labels_hold_known_names_only(measured: tuple[Samples, Samples]) -> None:
    _, after = measured
    values: dict[str, set[str]] = {}
    for _, labels in after:
        for label, value in labels:
            values.setdefault(label, set()).add(value)
    assert values["name"] == {"base"}
    assert values["model_name"] == {"plain", "base"}
    assert values["adapter"] == {"sql", "tools", "mix", "later", "_other"}
    assert values["api"] == {"V1", "V3"}
    assert values["method"] == {"Unary", "Stream"}
    assert values["interface"] == {"REST"}
    assert values["kind"] == {"prompt", "generation"}
    assert values["result"] == {"ok", "error"}
    assert not any("stranger" in value for known in values.values() for value in known)


async def test_a_request_is_accepted_or_rejected_and_answered_or_failed(measured: tuple[Samples, Samples]) -> None:
    _, after = measured
    accepted, rejected = total(after, "ovms_requests_accepted"), total(after, "ovms_requests_rejected")
    assert (accepted, rejected) == (16, 1)  # unknown models have nothing to be counted under
    assert total(after, "ovms_responses") + total(after, "ovms_graph_error") == accepted
    assert total(after, "vllm:e2e_request_latency_seconds_count") == total(after, "ovms_responses") == 12
