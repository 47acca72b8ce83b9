"""A real Ray on this machine with replicas of a tiny model, for the tests of a session; and what to ask it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve._private.common import ReplicaState
from safetensors.numpy import load_file, save_file

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.graph_pbtxt import render_graph
from ovms_lora.scale import build_app
from ovms_lora.scale.config import APPLICATION, ENGINE, ScaleConfig
from ovms_lora.scale.flags import config_of
from ovms_lora.scale.ray_environment import prefer_cluster_environment
from ovms_lora.server.keys import plain_keys
from tests.engine.lora_models import PRECISE, Base
from tests.tiny_llama import CHAT_TEMPLATE

MAX_LORAS = 4
TARGET = 4
MAX_SEQUENCES = 16
WAITING = 16
COLD = tuple(f"cold-{number}" for number in range(40))  # adapters on the loading path
BASE, SQL = "tiny", "sql"
KEY, ADMIN = "some-key", "admin-key"
PROMPT = "Once upon a time"
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    # So that loads are noticed in a second rather than in ten.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}


def write_repository(base: Base, folder: Path) -> Path:
    """Write a config.json for the base with one adapter of its own, a loading path and one to be loaded by clients."""
    original = base.adapter(folder / "loras" / SQL, target_modules=["q_proj", "v_proj"], strength=2.0)
    for number, alias in enumerate((*COLD, "mail"), start=2):
        _vary(original, folder / ("loras" if alias == "mail" else "cold") / alias, number)
    entry = {
        "name": BASE,
        "base_path": str(base.folder),
        "plugin_config": PRECISE,
        "lora_adapters": [{"alias": SQL, "path": f"loras/{SQL}"}],
        "lora_options": {"max_loras": MAX_LORAS, "dynamic_lora_loading_path": "cold"},
    }
    graph = render_graph(EngineOptions(max_num_seqs=MAX_SEQUENCES))
    (base.folder / "graph.pbtxt").write_text(graph)
    (base.folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_config_list": [{"config": entry}]}))
    return path


def _vary(original: Path, folder: Path, number: int) -> None:
    """Write an adapter of the same kind with other numbers: one of the same content would be the same adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes((original / "adapter_config.json").read_bytes())
    rng = np.random.default_rng(number)
    tensors = load_file(original / "adapter_model.safetensors")
    save_file({name: rng.permuted(t, axis=-1) for name, t in tensors.items()}, folder / "adapter_model.safetensors")


@contextmanager
def cluster(port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a small Ray, with Serve on a port and with this in its environment; nothing of it leaves the machine."""
    with mock.patch.dict(os.environ, {**_ENVIRONMENT, **environment}):
        prefer_cluster_environment()
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def fleet_config(path: Path, **changes: Any) -> ScaleConfig:
    """Return two replicas of a third of a processor, with keys."""
    flags = {"config_path": str(path), "num_cpus": 0.3, "target_ongoing_requests": TARGET, "log_level": "error"}
    config = config_of(
        {
            **flags,
            "allow_runtime_lora_updating": True,
            "file_system_poll_wait_seconds": 0,
            "limit": f"waiting_requests={WAITING}",
        }
    )
    options = replace(config.options, api_keys=plain_keys(KEY), admin_keys=plain_keys(ADMIN))
    return replace(config, options=options, **{"min_replicas": 2, "max_replicas": 2, **changes})


@dataclass(frozen=True, slots=True)
class Fleet:
    """A deployed application, asked over HTTP on the port of its ingress, or through Serve's proxy."""

    port: int
    proxy_port: int
    config_path: Path
    config: ScaleConfig

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def proxied(self) -> Fleet:
        """The same one, asked through Serve's proxy."""
        return replace(self, port=self.proxy_port)

    def deploy(self, **changes: Any) -> None:
        """Deploy it, changed or not; wait until it is there."""
        config = replace(self.config, own_port=self.port, **changes)
        serve.run(build_app(config), name=APPLICATION, route_prefix="/")

    def client(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def complete(self, model: str = BASE, *, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=request(model, **fields))

    def many(self, *models: str, at_once: int = 1, **fields: Any) -> None:
        """Ask for each of the models; all answers must be good."""
        with self.client() as client, ThreadPoolExecutor(at_once) as pool:
            asked = pool.map(lambda model: client.post("/v1/completions", json=request(model, **fields)), models)
            codes = Counter(answer.status_code for answer in asked)
        assert set(codes) == {200}, codes

    def samples(self, name: str, /, **labels: str) -> dict[str, float]:
        """Return a metric by replica, summed over what has these labels."""
        with self.client() as client:
            text = client.get("/metrics").text
        found: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found[sample.labels["replica"]] += sample.value
        return dict(found)

    def served(self, alias: str) -> Counter[str]:
        """Return how many requests for an adapter each replica has had."""
        counts = self.samples("ovms_lora_requests_total", adapter=alias)
        return Counter({replica: int(count) for replica, count in counts.items()})

    def resident(self) -> dict[str, float]:
        """Return how many adapters are in each replica's graph."""
        return self.samples("ovms_lora_resident")

    def replicas(self) -> int:
        """Return how many engine replicas run."""
        states = serve.status().applications[APPLICATION].deployments[ENGINE].replica_states
        return states.get(ReplicaState.RUNNING, 0)

    def processes(self) -> set[int]:
        """Return the ids of the engine replicas' processes."""
        title = f"ray::ServeReplica:{APPLICATION}:{ENGINE}".encode()
        return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _titled(path, title)}

    def kill(self, replica: str) -> None:
        """Kill a replica's process."""
        _kill(f"SERVE_REPLICA::{APPLICATION}#{ENGINE}#{replica}")

    def kill_only(self, deployment: str) -> None:
        """Kill the process of a deployment that has one replica; Serve starts another one."""
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        _kill(next(name for name in names if f"#{deployment}#" in name))


def _titled(path: Path, title: bytes) -> bool:
    try:
        return path.read_bytes().startswith(title)
    except OSError:  # it has just ended
        return False


def _kill(actor: str) -> None:
    ray.kill(ray.get_actor(actor, namespace="serve"))


def request(model: str = BASE, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}


def events(response: httpx.Response) -> Iterator[Any]:
    """Yield the data of events: JSON, or "[DONE]"."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
