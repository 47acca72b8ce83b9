"""What the measurements have in common: models, random adapters, and an engine that is asked and timed.

Ratios are taken within one run, over rounds in which every case has its turn: machines change their speed.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from safetensors.numpy import save_file

from ovms_lora.adapters.adapter import BaseLinears
from ovms_lora.core.config import EngineOptions, LoraOptions
from ovms_lora.core.request import AdapterUse, GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.lora_config import AdapterSpec, LoraConfig
from ovms_lora.engine.model import LoadedModel, load_model

RESULTS = Path(__file__).parent / "results"
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NUMBERS = itertools.count()


def write_adapter(folder: Path, base: BaseLinears, *, rank: int = 16, seed: int = 0, scale: float = 0.02) -> Path:
    """Write a random LoRA for all linears of the decoder's blocks, in PEFT's format."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for path, shape in base.shapes.items():
        if path.rsplit(".", 1)[-1] in ATTENTION_AND_MLP:
            a, b = rng.normal(size=(rank, shape.in_features)), rng.normal(size=(shape.out_features, rank))
            tensors[f"base_model.model.{path}.lora_A.weight"] = (a * scale).astype(np.float32)
            tensors[f"base_model.model.{path}.lora_B.weight"] = (b * scale).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION_AND_MLP)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def base_linears(model: Path) -> BaseLinears:
    """Return the linears of a model folder."""
    return GraphSource(model, EngineOptions()).linears


class Server:
    """One engine in this process, asked directly."""

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        speculation: SpeculationOptions | None = None,
        **options: Any,
    ) -> None:
        self._waiting: dict[str, int] = {}
        self._tokens = 0
        self._done = threading.Condition()
        config = None
        if adapters is not None:
            specs = tuple(AdapterSpec(alias, folder) for alias, folder in adapters.items())
            config = LoraConfig(LoraOptions(**options), adapters=specs)
        overrides = {"speculation": speculation} if speculation else {}
        self.model: LoadedModel = load_model(model, deliver=self._deliver, lora=config, overrides=overrides)

    def use(self, alias: str) -> tuple[AdapterUse, ...]:
        """Return what a request of this adapter carries."""
        assert self.model.lora, "this server has no runtime adapters"
        return self.model.lora.select(alias)

    def run(
        self, prompts: Sequence[Sequence[int]], uses: Sequence[tuple[AdapterUse, ...]], *, max_tokens: int
    ) -> tuple[int, float]:
        """Answer all prompts at once, greedily to `max_tokens`; return generated tokens and seconds."""
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        requests = [
            GenerationRequest(f"bench-{next(_NUMBERS)}", tuple(prompt), sampling, use)
            for prompt, use in zip(prompts, uses, strict=True)
        ]
        return self.answer(requests)

    def answer(self, requests: Sequence[GenerationRequest]) -> tuple[int, float]:
        """Answer all requests at once; return generated tokens and seconds."""
        with self._done:
            self._tokens = 0
            self._waiting = {request.request_id: 1 for request in requests}
        begin = time.perf_counter()
        for request in requests:
            self.model.engine.submit(request)
        with self._done:
            self._done.wait_for(lambda: not self._waiting)
        return self._tokens, time.perf_counter() - begin

    def close(self) -> None:
        """Stop the engine."""
        self.model.engine.stop()

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        with self._done:
            for output in outputs:
                if output.error:
                    raise output.error
                self._tokens += len(output.token_ids)
                if output.finished:
                    self._waiting.pop(output.request_id, None)
            self._done.notify()


def prompts(count: int, length: int, *, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts; they differ in their first token, so that no prefix is shared."""
    rng = np.random.default_rng(seed)
    return [[index + 10, *rng.integers(10, vocabulary, length - 1).tolist()] for index in range(count)]


def in_turn(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every case once to warm up and then `rounds` times, in turn; return what each run gave.

    Each round begins with another case: the first ones of a round often run on a rested machine.
    """
    for case in cases.values():
        case()
    found: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            found[name].append(cases[name]())
    return found


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second: median and spread over the rounds, and the median of the ratios to the first case."""

    median: float
    low: float
    high: float
    ratio: float


def rates(found: Mapping[str, Sequence[float]]) -> dict[str, Rate]:
    """Summarise rounds; each ratio is taken within its round."""
    first = next(iter(found.values()))
    return {
        name: Rate(
            statistics.median(values),
            min(values),
            max(values),
            statistics.median(value / base for value, base in zip(values, first, strict=True)),
        )
        for name, values in found.items()
    }


def machine() -> dict[str, Any]:
    """Name the machine and what runs on it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "openvino": ov.get_version(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write results to bench/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1), encoding="utf-8")
    return path
