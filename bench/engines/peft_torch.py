"""Hugging Face transformers and PEFT: the same weights, the rows of one adapter after another's.

Computes in bfloat16 where OpenVINO does, and in float32 where the processor would have to emulate that. Prompts of
different lengths are padded on the left, as transformers wants it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.engines.job import Answer, Job, Setup, in_groups
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.model import read_options


class PeftTorch:
    """A model of transformers, with adapters or without."""

    def __init__(self, setup: Setup) -> None:
        assert setup.source, "loaded from it"
        precision = GraphSource(*read_options(setup.model)).inference_dtype
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._model: Any = AutoModelForCausalLM.from_pretrained(setup.source, dtype=dtype).eval()
        self._adapted = bool(setup.adapters)
        for name, folder in setup.adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, name)
            else:
                self._model = PeftModel.from_pretrained(self._model, folder, name)
        self._model.to(dtype)

    def run(self, job: Job) -> Answer:
        """Do a job, one adapter after another."""
        begin = time.perf_counter()
        tokens = in_groups(job, lambda adapter, prompts: self._generate(adapter, prompts, job.tokens))
        return Answer(tokens, time.perf_counter() - begin)

    def _generate(self, adapter: str | None, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode(), self._use(adapter):
            found = self._model.generate(input_ids=inputs, attention_mask=mask, eos_token_id=None, **limits)
        answers: list[list[int]] = found[:, longest:].tolist()
        return answers

    def _use(self, adapter: str | None) -> AbstractContextManager[Any]:
        if not self._adapted:
            return nullcontext()
        if adapter is None:
            disabled: AbstractContextManager[Any] = self._model.disable_adapter()
            return disabled
        self._model.set_adapter(adapter)
        return nullcontext()
