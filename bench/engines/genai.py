"""OpenVINO GenAI's ContinuousBatchingPipeline on the same IR, with the properties that our server would use.

A call of `generate` takes one set of adapters for all of its prompts, so different adapters go one after another; they
are switched as its documentation says: all are given when the pipeline is made, and the generation config names one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import openvino as ov
import openvino_genai as genai

from bench.engines.job import Answer, Job, Setup, in_groups
from ovms_lora.adapters.safetensors_file import WEIGHTS_NAME
from ovms_lora.engine.model import read_options

_CACHE_GIB = 1


class GenAI:
    """A pipeline, with adapters or without."""

    def __init__(self, setup: Setup) -> None:
        folder, options = read_options(setup.model)
        self._adapters = {name: genai.Adapter(path / WEIGHTS_NAME) for name, path in setup.adapters.items()}
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GIB
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = options.max_num_batched_tokens
        scheduler.dynamic_split_fuse = options.dynamic_split_fuse
        properties = dict(options.plugin_config)
        if self._adapters:
            properties["adapters"] = genai.AdapterConfig(list(self._adapters.values()))
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, options.device, properties)

    def run(self, job: Job) -> Answer:
        """Do a job, one adapter after another."""
        begin = time.perf_counter()
        tokens = in_groups(job, lambda adapter, prompts: self._generate(adapter, prompts, job.tokens))
        return Answer(tokens, time.perf_counter() - begin)

    def _generate(self, adapter: str | None, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.max_new_tokens = tokens
        if self._adapters:
            config.adapters = genai.AdapterConfig(self._adapters[adapter]) if adapter else genai.AdapterConfig()
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        answers = self._pipeline.generate(inputs, [config] * len(inputs))
        return [list(answer.m_generation_ids[0]) for answer in answers]
