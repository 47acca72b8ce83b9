"""An LLM on the fake device, with adapters that are any folder with an adapter_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

from ovms_lora import LLM
from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import AdapterNotFoundError
from ovms_lora.core.request import AdapterUse
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.engine import Deliver, Engine
from ovms_lora.engine.lora_config import AdapterSpec, LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.model import GenerationDefaults, LoadedModel
from ovms_lora.engine.prompt_lookup import PromptLookup
from ovms_lora.engine.structured import ConstraintCompiler
from tests.engine.harness import TOKENIZER, AnyAdapters
from tests.engine.stepping import FakeAdapter
from tests.fakes import EOS, FakeRunner

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if tools %}<tools>{{ tools | length }}{% endif %}{% if mood %}<mood>{{ mood }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class FakeRuntime:
    """Adapters whose digest is the name of their folder."""

    def __init__(self) -> None:
        self.loads: list[Path] = []
        self._folders: dict[str, Path] = {}

    def load(self, spec: AdapterSpec) -> None:
        if not (spec.folder / "adapter_config.json").exists():
            raise AdapterNotFoundError(str(spec.folder))
        self.loads.append(spec.folder)
        self._folders[spec.alias] = spec.folder

    def select(self, alias: str) -> tuple[AdapterUse, ...]:
        return (AdapterUse(FakeAdapter(self._folders[alias].name)),)


@contextmanager
def fake_llm(runner: FakeRunner | None = None, **arguments: Any) -> Iterator[LLM]:
    """Yield what `build_llm` makes; close it at the end."""
    device = runner or FakeRunner(num_blocks=512)
    llm = build_llm(device, **arguments)
    try:
        yield llm
    finally:
        device.gate.set()
        llm.close()


def build_llm(
    runner: FakeRunner,
    /,
    *,
    max_waiting: int = 256,
    max_model_len: int = 64,
    defaults: GenerationDefaults | None = None,
    template: str | None = TEMPLATE,
    **arguments: Any,
) -> LLM:
    """Return an LLM on a fake device; `arguments` are the LLM's."""

    def load(
        folder: Path,
        *,
        deliver: Deliver,
        device: str | None,
        plugin_config: Mapping[str, Any] | None,
        overrides: Mapping[str, Any],
        lora: LoraConfig | None,
    ) -> LoadedModel:
        options = EngineOptions(**overrides, device=device or "CPU", plugin_config=dict(plugin_config or {}))
        engine = Engine(
            runner,
            TOKENIZER,
            options,
            deliver=deliver,
            max_model_len=max_model_len,
            eos_token_ids=[EOS],
            max_waiting=max_waiting,
            residency=AnyAdapters(),
            drafter=PromptLookup(options.speculation) if options.speculation else None,
        )
        engine.start()
        runtime = cast(LoraRuntime, FakeRuntime()) if lora else None
        chat = ChatTemplate(template) if template else None
        constraints = ConstraintCompiler(TOKENIZER, ())
        return LoadedModel(
            folder, engine, TOKENIZER, chat, defaults or GenerationDefaults(), options, constraints, lora=runtime
        )

    with mock.patch("ovms_lora.llm.load_model", load):
        return LLM("a-model", **arguments)


def adapter(folder: Path) -> str:
    """Make a folder that the fake runtime takes for an adapter; return its path."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return str(folder)
