"""What the measurements have in common: models, random adapters, and an engine that is asked and timed.

What is measured with it, and how it is compared, is not known here.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ovms_lora.adapters.adapter import BaseLinears
from ovms_lora.core.config import EngineOptions, LoraOptions
from ovms_lora.core.request import AdapterUse, GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.lora_config import AdapterSpec, LoraConfig
from ovms_lora.engine.model import LoadedModel, load_model

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FloatArray = npt.NDArray[np.float32]
_KINDS = 8
_NUMBERS = itertools.count()


def write_adapter(folder: Path, base: BaseLinears, *, rank: int = 16, seed: int = 0, scale: float = 0.02) -> Path:
    """Write a random LoRA for all linears of the decoder's blocks, in PEFT's format."""
    return _save(folder, _random_lora(base, rank, seed, scale), rank)


def write_adapters(folder: Path, base: BaseLinears, count: int, *, rank: int = 16) -> dict[str, Path]:
    """Write so many different adapters a0, a1, …; return their folders by name.

    Each has values of its own in one of eight random ones, so that hundreds are written in seconds. In half precision.
    """
    kinds = [_random_lora(base, rank, seed, 0.02) for seed in range(min(count, _KINDS))]
    found = {}
    for index in range(count):
        tensors = {name: array.astype(np.float16) for name, array in kinds[index % _KINDS].items()}
        first = next(iter(tensors))
        tensors[first] = np.roll(tensors[first], index)
        found[f"a{index}"] = _save(folder / f"r{rank}-a{index}", tensors, rank)
    return found


def _random_lora(base: BaseLinears, rank: int, seed: int, scale: float) -> dict[str, FloatArray]:
    rng = np.random.default_rng(seed)
    tensors: dict[str, FloatArray] = {}
    for path, shape in base.shapes.items():
        if path.rsplit(".", 1)[-1] in ATTENTION_AND_MLP:
            for part, size in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
                name = f"base_model.model.{path}.lora_{part}.weight"
                tensors[name] = rng.standard_normal(size, np.float32) * np.float32(scale)
    return tensors


def _save(folder: Path, tensors: dict[str, Any], rank: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION_AND_MLP)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def base_linears(model: Path) -> BaseLinears:
    """Return the linears of a model folder."""
    return GraphSource(model, EngineOptions()).linears


@dataclass(frozen=True, slots=True)
class Run:
    """What a call of `Server.run` gave: the tokens of each request, when each came, in seconds since the call."""

    tokens: list[list[int]]
    times: list[list[float]]
    seconds: float

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def first_token_times(self) -> list[float]:
        """Seconds from the call to the first token of each request."""
        return [times[0] for times in self.times]

    @property
    def intervals(self) -> list[float]:
        """Seconds between two tokens of one request, of all requests."""
        return [later - earlier for times in self.times for earlier, later in itertools.pairwise(times)]


class Server:
    """One engine in this process, asked directly."""

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Load a model; `overrides` are EngineOptions, `options` LoraOptions for those with adapters."""
        self._waiting: set[str] = set()
        self._delivered: list[tuple[float, Sequence[SequenceOutput]]] = []
        self._done = threading.Condition()
        config = None
        if adapters is not None:
            specs = tuple(AdapterSpec(alias, folder) for alias, folder in adapters.items())
            config = LoraConfig(LoraOptions(**options), adapters=specs)
        self.model: LoadedModel = load_model(model, deliver=self._deliver, overrides=overrides, lora=config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self, alias: str) -> tuple[AdapterUse, ...]:
        """Return what a request of this adapter carries."""
        assert self.model.lora, "this server has no runtime adapters"
        return self.model.lora.select(alias)

    def run(self, prompts: Sequence[Sequence[int]], uses: Sequence[tuple[AdapterUse, ...]], *, max_tokens: int) -> Run:
        """Answer all prompts at once, greedily to `max_tokens`."""
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        requests = [
            GenerationRequest(f"bench-{next(_NUMBERS)}", tuple(prompt), sampling, use)
            for prompt, use in zip(prompts, uses, strict=True)
        ]
        return self.answer(requests)

    def answer(self, requests: Sequence[GenerationRequest]) -> Run:
        """Answer all requests at once."""
        with self._done:
            self._delivered = []
            self._waiting = {request.request_id for request in requests}
        begin = time.perf_counter()
        for request in requests:
            self.model.engine.submit(request)
        with self._done:
            self._done.wait_for(lambda: not self._waiting)
        return self._collected([request.request_id for request in requests], begin)

    def close(self) -> None:
        """Stop the engine."""
        self.model.engine.stop()

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        now = time.perf_counter()
        with self._done:
            self._delivered.append((now, outputs))
            self._waiting.difference_update(output.request_id for output in outputs if output.finished)
            if not self._waiting:
                self._done.notify()

    def _collected(self, request_ids: Sequence[str], begin: float) -> Run:
        tokens: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
        times: dict[str, list[float]] = {request_id: [] for request_id in request_ids}
        for moment, outputs in self._delivered:
            for output in outputs:
                if output.error:
                    raise output.error
                tokens[output.request_id] += output.token_ids
                times[output.request_id] += [moment - begin] * len(output.token_ids)
        return Run(list(tokens.values()), list(times.values()), self._delivered[-1][0] - begin)


def prompts(count: int, length: int, *, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts; they differ in their first token, so that no prefix is shared."""
    rng = np.random.default_rng(seed)
    return [[index + 10, *rng.integers(10, vocabulary, length - 1).tolist()] for index in range(count)]
