"""Replicas of the real engine on a real Ray: where requests go, and what clients get when replicas come and go."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from openai import OpenAI
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from ovms_lora.scale.config import INGRESS, LEDGER
from tests.scale.fleet import (
    ADMIN,
    BASE,
    COLD,
    KEY,
    MAX_LORAS,
    MAX_SEQUENCES,
    SQL,
    TARGET,
    Fleet,
    events,
    request,
    wait_for,
)

LONG = 400
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_multi_lora.py"


def test_requests_stick_to_the_replica_that_holds_their_adapter(fleet: Fleet) -> None:
    aliases = COLD[:4]
    fleet.many(*aliases)  # brings each in somewhere
    before = {alias: fleet.served(alias) for alias in aliases}
    holders = {alias: counts.most_common(1)[0][0] for alias, counts in before.items()}
    fleet.many(*(alias for alias in aliases for _ in range(25)), at_once=2)
    stuck = sum(fleet.served(alias)[holders[alias]] - before[alias][holders[alias]] for alias in aliases)
    assert stuck / 100 >= 0.95
    assert set(Counter(holders.values()).values()) == {2}, "the adapters are spread evenly"


def test_requests_for_a_cold_adapter_that_come_together_bring_it_in_once(fleet: Fleet) -> None:
    alias = COLD[10]
    fleet.many(*[alias] * TARGET, at_once=TARGET)
    assert len(+fleet.served(alias)) == 1


def test_requests_of_a_busy_holder_go_to_another_replica(fleet: Fleet) -> None:
    alias = COLD[11]
    fleet.many(alias)
    before = fleet.served(alias)
    fleet.many(*[alias] * 4 * TARGET, at_once=3 * TARGET, max_tokens=100)
    assert all((fleet.served(alias) - before).values())
    assert len(fleet.served(alias) - before) == 2


def test_requests_of_the_base_go_anywhere(fleet: Fleet) -> None:
    before = fleet.samples("ovms_responses", name=BASE)
    fleet.many(*[BASE] * 40)
    after = fleet.samples("ovms_responses", name=BASE)
    assert all(after[replica] - before.get(replica, 0) >= 5 for replica in after)
    assert len(after) == 2


def test_requests_that_come_together_are_shared_evenly(fleet: Fleet) -> None:
    for _ in range(3):
        before = fleet.samples("ovms_responses", name=BASE)
        fleet.many(*[BASE] * 2 * TARGET, at_once=2 * TARGET, max_tokens=100)
        after = fleet.samples("ovms_responses", name=BASE)
        assert [after[replica] - before.get(replica, 0) for replica in after] == [TARGET, TARGET]


def test_each_replica_holds_the_adapters_used_last(fleet: Fleet) -> None:
    fleet.many(*COLD, at_once=4)
    assert all(count <= MAX_LORAS for count in fleet.resident().values())
    assert sum(fleet.resident().values()) == 2 * MAX_LORAS
    used = {name for name in COLD if sum(fleet.samples("ovms_lora_resident", adapter=name).values())}
    assert len(used & set(COLD[-2 * MAX_LORAS - 4 :])) >= 2 * MAX_LORAS - 2


def test_answers_are_those_of_the_adapter(fleet: Fleet) -> None:
    texts = {name: fleet.complete(name).json()["choices"][0]["text"] for name in (BASE, SQL, *COLD[:2])}
    assert len(set(texts.values())) == 4
    assert fleet.complete(f"{BASE}:{COLD[0]}").json()["choices"][0]["text"] == texts[COLD[0]]
    assert fleet.complete(lora=[{"alias": SQL}]).json()["choices"][0]["text"] == texts[SQL]


def test_the_example_asks_base_and_adapters_by_their_ids(fleet: Fleet) -> None:
    example = runpy.run_path(str(EXAMPLE))
    with OpenAI(base_url=f"{fleet.url}/v1", api_key=KEY) as client:
        ids = example["ids"](client)
        assert {BASE, f"{BASE}:{SQL}", f"{BASE}:{COLD[7]}"} <= set(ids)
        answers = {name: "".join(example["answer"](client, name)) for name in (BASE, f"{BASE}:{SQL}")}
    assert answers[BASE]
    assert answers[BASE] != answers[f"{BASE}:{SQL}"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v3/completions"])
def test_streams_come_as_they_are_made(asked: Fleet, path: str) -> None:
    begun, times = time.monotonic(), []
    fields = request(SQL, max_tokens=LONG, stream=True)
    with asked.client() as client, client.stream("POST", path, json=fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        got = []
        for event in events(response):
            got.append(event)
            times.append(time.monotonic() - begun)
    assert got[-1] == "[DONE]"
    assert times[0] < times[-1] / 3, "the first event comes long before the last"
    text = "".join(choice["text"] for event in got[:-1] for choice in event["choices"])
    assert text == asked.complete(SQL, path=path, max_tokens=LONG).json()["choices"][0]["text"]


def test_a_client_that_leaves_frees_its_place(asked: Fleet) -> None:
    fields = request(SQL, max_tokens=LONG, n=8, stream=True)
    with asked.client() as client, client.stream("POST", "/v1/completions", json=fields) as response:
        next(events(response))
    wait_for(lambda: not sum(asked.samples("vllm:num_requests_running").values()), seconds=20)


def test_a_replica_killed_in_mid_stream_gives_an_error_event_and_no_end(fleet: Fleet, asked: Fleet) -> None:
    fields = request(SQL, max_tokens=LONG, n=16, stream=True)
    with asked.client() as client, client.stream("POST", "/v1/completions", json=fields) as response:
        stream = events(response)
        next(stream)
        running = fleet.samples("vllm:num_requests_running")
        victim = max(running, key=lambda name: running[name])
        fleet.kill(victim)
        begun = time.monotonic()
        rest = list(stream)
    assert rest[-1]["error"]["type"] == "ServiceUnavailableError"
    assert "[DONE]" not in rest
    assert time.monotonic() - begun < 10
    # New requests go elsewhere at once, those for what it held, too.
    begun = time.monotonic()
    fleet.many(SQL, BASE, SQL, BASE)
    assert time.monotonic() - begun < 10
    wait_for(lambda: fleet.replicas() == 2)
    wait_for(lambda: len(fleet.resident()) == 2)


def check_a_new_replica_has_mail_until_it_is_unloaded(fleet: Fleet, admin: httpx.Client) -> None:
    fleet.kill(next(iter(fleet.resident())))
    wait_for(lambda: fleet.replicas() == 2)
    wait_for(lambda: len(fleet.resident()) == 2)
    fleet.many(*["mail"] * 16, at_once=16)
    assert len(fleet.samples("ovms_lora_resident", adapter="mail")) == 2
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "mail"}).status_code == 200
    assert {fleet.complete("mail").status_code for _ in range(6)} == {404}


def test_an_ingress_that_dies_is_replaced_on_the_same_port(fleet: Fleet) -> None:
    fleet.kill_only(INGRESS)
    wait_for(lambda: not _answers(fleet))
    wait_for(lambda: _answers(fleet))
    fleet.many(SQL, BASE)


def _answers(fleet: Fleet) -> bool:
    try:
        return fleet.complete().is_success
    except httpx.HTTPError:
        return False


def test_the_port_of_the_ingress_bounds_what_comes(fleet: Fleet) -> None:
    # A head that does not end never becomes a request: only what holds the socket can refuse it.
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nx-much: " + b"a" * 40_000)
        assert client.recv(100).startswith(b"HTTP/1.1 431 ")


def test_adapters_are_loaded_and_unloaded_in_all_replicas_and_in_those_that_start_later(fleet: Fleet) -> None:
    folder = fleet.config.options.lora_path_prefixes[0] / "loras" / "mail"
    assert fleet.complete("mail").status_code == 404
    with fleet.client(ADMIN) as admin:
        loaded = admin.post("/v1/load_lora_adapter", json={"lora_name": "mail", "lora_path": str(folder)})
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mail' added successfully.")
        again = admin.post("/v1/load_lora_adapter", json={"lora_name": "mail", "lora_path": str(folder)})
        assert again.status_code == 400
        fleet.many(*["mail"] * 8, at_once=8)
        check_a_new_replica_has_mail_until_it_is_unloaded(fleet, admin)
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "mail"}).status_code == 404
        assert admin.post("/v1/config/reload").status_code == 200


def test_what_was_loaded_outlives_the_ledger_and_a_replica_that_die_together(fleet: Fleet) -> None:
    folder = fleet.config.options.lora_path_prefixes[0] / "loras" / "mail"
    with fleet.client(ADMIN) as admin:
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "mail", "lora_path": str(folder)}).is_success
        fleet.many(*["mail"] * 8, at_once=8)
        fleet.kill_only(LEDGER)
        check_a_new_replica_has_mail_until_it_is_unloaded(fleet, admin)


def test_a_replica_that_goes_ends_what_it_has_begun(fleet: Fleet) -> None:
    begun = threading.Barrier(2 * TARGET + 1)

    def last_event() -> object:
        fields = request(max_tokens=LONG, n=MAX_SEQUENCES // TARGET, stream=True)
        with fleet.client() as client, client.stream("POST", "/v1/completions", json=fields) as response:
            stream = events(response)
            next(stream)
            begun.wait(60)
            return list(stream)[-1]

    with ThreadPoolExecutor(2 * TARGET) as pool:
        streams = [pool.submit(last_event) for _ in range(2 * TARGET)]
        begun.wait(60)
        fleet.deploy(min_replicas=1, max_replicas=1)
        assert [each.result(60) for each in streams] == ["[DONE]"] * len(streams)
    wait_for(lambda: fleet.replicas() == 1)
    fleet.deploy()
    wait_for(lambda: len(fleet.resident()) == 2)


def test_a_request_that_no_replica_takes_ends_with_503(fleet: Fleet) -> None:
    stopped = fleet.processes()
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answer = fleet.complete()
        seconds = time.monotonic() - begun
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no replica takes the request now")
    assert "retry-after" in answer.headers
    assert 9 < seconds < 15
    wait_for(lambda: _answers(fleet))
    assert fleet.processes() == stopped, "what only paused is not replaced"


def test_a_replica_that_hangs_is_replaced_while_the_other_one_answers(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovms_lora.scale.app._HUNG_SECONDS", 1.0)
    fleet.deploy()
    victim = min(fleet.processes())
    os.kill(victim, signal.SIGSTOP)
    with ThreadPoolExecutor(6) as pool:
        codes = Counter(pool.map(lambda _: fleet.complete().status_code, range(6)))
    assert codes[200] + codes[503] == 6, codes
    wait_for(lambda: len(fleet.processes() - {victim}) == 2)
    wait_for(lambda: len(fleet.resident()) == 2)
    fleet.many(*[BASE, SQL] * 4, at_once=8)
    wait_for(lambda: victim not in fleet.processes())


def test_replicas_come_and_go_with_the_load(fleet: Fleet) -> None:
    quick = {"upscale_delay_s": 0, "downscale_delay_s": 1, "look_back_period_s": 11}
    fleet.deploy(min_replicas=1, max_replicas=2, autoscaling=quick)
    wait_for(lambda: fleet.replicas() == 1)
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            fleet.complete(max_tokens=LONG)

    with ThreadPoolExecutor(3 * TARGET) as pool:
        for _ in range(3 * TARGET):
            pool.submit(load)
        try:
            wait_for(lambda: fleet.replicas() == 2)
        finally:
            done.set()
    wait_for(lambda: fleet.replicas() == 1)
    assert fleet.complete().status_code == 200


def test_the_file_for_serve_deploy_deploys_the_same_application(fleet: Fleet) -> None:
    document = yaml.safe_load((ROOT / "config" / "ray.yaml").read_text())
    (application,) = document["applications"]
    application["args"] |= {"config_path": str(fleet.config_path), "num_cpus": 0.3}
    controller = _get_global_client()
    assert controller, "Serve runs"
    controller.deploy_apps(ServeDeploySchema(**document), _blocking=True)
    with fleet.proxied().client("another-key") as anybody:  # the file has no keys
        wait_for(lambda: anybody.post("/v1/completions", json=request()).is_success)
        assert anybody.post("/v1/completions", json=request(SQL)).json()["choices"][0]["text"]
    fleet.deploy()
    assert fleet.complete().is_success
    wait_for(lambda: len(fleet.resident()) == 2)
