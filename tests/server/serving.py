"""Servers for tests: the real engine on the fake runner, behind the real application."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError, OvmsLoraError
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.engine import Deliver, Engine
from ovms_lora.engine.graph_source import LoraTargets
from ovms_lora.engine.lora_config import LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.model import GenerationDefaults, LoadedModel
from ovms_lora.engine.prompt_lookup import PromptLookup
from ovms_lora.engine.structured import ConstraintCompiler
from ovms_lora.server.app import build_app
from ovms_lora.server.model_source import ConfigFile, ModelSource, SingleModel
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.state import ServerState
from tests.adapters.adapter_files import good_config, tiny_base, write_adapter
from tests.engine.fake_tiles import FakeTiles
from tests.fakes import EOS, FakeRunner, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


class FakeGraphs:
    """A graph source whose linears are those of `tiny_base`, and whose tiles take everything."""

    linears = tiny_base()
    inference_dtype = "f32"
    affords_plain = True

    def compile(self, targets: LoraTargets) -> SimpleNamespace:
        return SimpleNamespace(tiles=FakeTiles(targets.width), targets=targets)


class AdoptingRunner:
    """Takes every graph."""

    def adopt(self, graph: object, *, keep_plain: bool) -> None:
        del graph, keep_plain


@dataclass
class FakeModels:
    """A `load_model` whose folders are names: each is a model on a fake runner, `broken` ones fail.

    Runtime adapters are real ones for `tiny_base`, in the real runtime; the fake runner's text depends on them.
    """

    options: EngineOptions = field(default_factory=lambda: EngineOptions(max_num_batched_tokens=64))
    defaults: GenerationDefaults = field(default_factory=lambda: GenerationDefaults(eos_token_ids=(EOS,)))
    template: str | None = TEMPLATE
    max_model_len: int = 512
    max_waiting: int | None = None
    runner: Callable[[], FakeRunner] = lambda: FakeRunner(num_blocks=1024)
    runners: dict[str, FakeRunner] = field(default_factory=dict)
    engines: list[Engine] = field(default_factory=list)

    def __call__(
        self,
        folder: Path,
        *,
        deliver: Deliver,
        graph_path: str | None,
        device: str | None,
        plugin_config: Mapping[str, Any],
        overrides: Mapping[str, Any],
        lora: LoraConfig | None,
        max_waiting: int,
        on_compile: Callable[[], None] = lambda: None,
    ) -> LoadedModel:
        on_compile()
        if "broken" in folder.name:
            raise ModelFolderError(f"{folder.name} is not a model", hint="export it again")
        tokenizer = byte_tokenizer()
        options = replace(self.options, **overrides)
        runner = self.runners[folder.name] = self.runner()
        runtime = LoraRuntime(FakeGraphs(), lora) if lora else None  # type: ignore[arg-type]
        if runtime:
            runtime.compile()
        engine = Engine(
            runner,
            tokenizer,
            options,
            deliver=deliver,
            max_model_len=self.max_model_len,
            eos_token_ids=self.defaults.eos_token_ids,
            max_waiting=self.max_waiting or max_waiting,
            residency=runtime.graphs.residency if runtime else None,
            drafter=PromptLookup(options.speculation) if options.speculation else None,
        )
        if runtime:
            runtime.graphs.attach(engine, AdoptingRunner())  # type: ignore[arg-type]
        engine.start()
        self.engines.append(engine)
        template = ChatTemplate(self.template) if self.template else None
        constraints = ConstraintCompiler(tokenizer, self.defaults.eos_token_ids)
        return LoadedModel(folder, engine, tokenizer, template, self.defaults, options, constraints, runtime)


def write_config(folder: Path, *names: str) -> Path:
    """Write a config.json that names models; each lies in a folder of its own name."""
    entries = [{"config": {"name": name, "base_path": name}} for name in names]
    path = folder / "config.json"
    path.write_text(json.dumps({"model_config_list": entries}))
    return path


def write_adapters(folder: Path, *aliases: str) -> Path:
    """Write good adapters, each with a content of its own, into folders of their names."""
    for alias in aliases:
        write_adapter(folder / alias, config=good_config(lora_alpha=1 + sum(alias.encode())))
    return folder


def write_lora_config(folder: Path, **entry: Any) -> Path:
    """Write a config.json of `plain` and `base`, which has adapters `sql` and `tools`, and the composite `mix`.

    `entry` replaces keys of base's entry; None leaves a key out.
    """
    adapters = [{"alias": "sql", "path": "loras/sql"}, {"alias": "tools", "path": "loras/tools", "alpha": 2.0}]
    parts = [{"adapter_alias": "sql", "alpha": 0.7}, {"adapter_alias": "tools"}]
    base = {
        "name": "base",
        "base_path": "base",
        "lora_adapters": adapters,
        "composite_lora_adapters": [{"alias": "mix", "components": parts}],
        **entry,
    }
    base = {key: value for key, value in base.items() if value is not None}
    entries = [{"config": {"name": "plain", "base_path": "plain"}}, {"config": base}]
    if not (folder / "loras").exists():
        write_adapters(folder / "loras", "sql", "tools")
    path = folder / "config.json"
    path.write_text(json.dumps({"model_config_list": entries}))
    return path


class Served:
    """A running application and a client of it."""

    def __init__(
        self, app: FastAPI, client: httpx.AsyncClient, models: FakeModels, failures: list[OvmsLoraError]
    ) -> None:
        self.app = app
        self.client = client
        self.models = models
        self.failures = failures

    @property
    def state(self) -> ServerState:
        state: ServerState = self.app.state.server
        return state

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def text(self, path: str = "/v3/completions", **body: Any) -> str:
        """Return the text of the first choice, streamed or not."""
        response = await self.post(path, **body)
        assert response.status_code == 200, response.text
        if body.get("stream"):
            return "".join(piece_of(chunk) for chunk in chunks_of(response.text))
        choice = response.json()["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])

    async def settled(self) -> None:
        """Wait until no engine has anything to do."""
        async with asyncio.timeout(5):
            while any(e.stats().running + e.stats().waiting for e in self.models.engines):
                await asyncio.sleep(0.005)


def chunks_of(stream: str) -> list[dict[str, Any]]:
    """Return the events of a complete stream, without `[DONE]`, which must stand at its end."""
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def piece_of(chunk: dict[str, Any]) -> str:
    if not chunk["choices"]:
        return ""
    choice = chunk["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


@contextlib.asynccontextmanager
async def serving(
    models: FakeModels | None = None,
    *,
    source: ModelSource | Path | None = None,
    options: ServerOptions | None = None,
    wait: bool = True,
) -> AsyncIterator[Served]:
    """Run an application in this process; by default with one model named `m`."""
    models = models or FakeModels()
    failures: list[OvmsLoraError] = []
    if source is None:
        source = SingleModel("m", Path("m"), {})
    elif isinstance(source, Path):
        source = ConfigFile(source)
    options = options or ServerOptions(poll_seconds=0)
    app = build_app(options, source, models, on_failure=failures.append)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        served = Served(app, client, models, failures)
        if wait:
            async with asyncio.timeout(5):
                while not served.state.lifecycle.started and not failures:
                    await asyncio.sleep(0.002)
        yield served


def with_defaults(**values: Any) -> FakeModels:
    """Return models whose generation_config.json says these things."""
    return FakeModels(defaults=replace(GenerationDefaults(eos_token_ids=(EOS,)), **values))


def token_ids(text: str) -> Sequence[int]:
    return list(text.encode())
