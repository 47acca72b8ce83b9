"""TimedEngine: one engine in this process that notes when the first and the last token of each request came.

Times are `time.perf_counter()`, which all processes of a machine share on Linux.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.request import GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.lora_config import AdapterSpec, LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.model import LoadedModel, load_model

_LOADING_THREADS = 32  # as the server has


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: random tokens as its prompt, an adapter or None, and how many tokens are generated."""

    name: str
    prompt: tuple[int, ...]
    adapter: str | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """When a request was handed in, had its first token, and its last."""

    begin: float
    first: float
    last: float


class TimedEngine:
    """An engine with adapters by alias; `ended` is called by the engine thread, or by a loading thread."""

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path],
        ended: Callable[[Answered], None],
        *,
        threads: int | None = None,
        engine_options: Mapping[str, Any] | None = None,
        **lora_options: Any,
    ) -> None:
        specs = tuple(AdapterSpec(alias, folder) for alias, folder in adapters.items())
        self._ended = ended
        self._times: dict[str, tuple[float, float]] = {}
        self._loading = ThreadPoolExecutor(_LOADING_THREADS)
        self.adapters = adapters
        self.model: LoadedModel = load_model(
            model,
            deliver=self._deliver,
            # Not bound to processors: several processes with one thread each would be bound to the same one.
            plugin_config={"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False} if threads else {},
            overrides=engine_options,
            lora=LoraConfig(LoraOptions(**lora_options), adapters=specs),
        )

    @property
    def lora(self) -> LoraRuntime:
        """Its adapters."""
        assert self.model.lora, "loaded with adapters"
        return self.model.lora

    def host_adapter(self, alias: str) -> Adapter:
        """Return an adapter's arrays."""
        adapter = self.lora.select(alias)[0].adapter
        assert isinstance(adapter, Adapter), "of the store"
        return adapter

    def submit(self, asked: Asked) -> None:
        """Hand a request in; its adapter is read in another thread, as by the server."""
        begin = time.perf_counter()
        if asked.adapter is None:
            self._submit(asked, begin)
        else:
            self._loading.submit(self._submit, asked, begin)

    def close(self) -> None:
        """Stop the engine."""
        self._loading.shutdown()
        self.model.engine.stop()

    def _submit(self, asked: Asked, begin: float) -> None:
        uses = self.lora.select(asked.adapter) if asked.adapter else ()
        sampling = SamplingParams(temperature=0, max_tokens=asked.tokens, ignore_eos=True)
        self._times[asked.name] = (begin, 0.0)
        self.model.engine.submit(GenerationRequest(asked.name, asked.prompt, sampling, uses))

    def _deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        now = time.perf_counter()
        for output in outputs:
            if output.error:
                raise output.error
            begin, first = self._times[output.request_id]
            first = first or now
            self._times[output.request_id] = (begin, first)
            if output.finished:
                del self._times[output.request_id]
                self._ended(Answered(begin, first, now))


class Waiter:
    """Collects answers until as many have come as are waited for."""

    def __init__(self) -> None:
        self._answers: list[Answered] = []
        self._changed = threading.Condition()

    def __call__(self, answer: Answered) -> None:
        """Take an answer; this is an engine's `ended`."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify()

    def all(self, count: int) -> list[Answered]:
        """Return the next `count` answers, when they are there."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._answers) >= count)
            found, self._answers = self._answers[:count], self._answers[count:]
        return found
