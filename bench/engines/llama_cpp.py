"""llama.cpp on the same weights in Q8_0: rows are sequences of one batch of its C interface, chosen from by numpy.

A context has one set of adapters at a time, so different adapters go one after another, as its server does it too.
Needs the package llama-cpp-python (requirements/llama_cpp.txt).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as c
import numpy as np

from bench.engines import gguf_files
from bench.engines.job import Answer, Job, Setup, in_groups

_ROW_TOKENS = 256  # prompt and answer of a row
_BATCH_TOKENS = 512  # computed at once, llama.cpp's default


class LlamaCpp:
    """A model, its adapters, and a context for as many sequences as rows."""

    def __init__(self, setup: Setup) -> None:
        assert setup.source and setup.vocabulary, "made of these"
        # Beside the source: it is the same for every run.
        path = gguf_files.write_model(setup.source, setup.vocabulary, setup.source / "model-q8_0.gguf")
        c.llama_backend_init()
        model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        assert model, "loaded"
        self._vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        self._adapters = {name: _load(model, setup, folder) for name, folder in setup.adapters.items()}
        self._context = c.llama_init_from_model(model, _context_params(setup.max_batch))
        assert self._context, "made"
        self._batch = c.llama_batch_init(_BATCH_TOKENS, 0, 1)

    def run(self, job: Job) -> Answer:
        """Do a job, one adapter after another."""
        begin = time.perf_counter()
        tokens = in_groups(job, lambda adapter, prompts: self._generate(adapter, prompts, job.tokens))
        return Answer(tokens, time.perf_counter() - begin)

    def _generate(self, adapter: str | None, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        self._use(adapter)
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        begins = [0] * len(prompts)
        chosen = self._prefill(prompts)
        answers = [[token] for token in chosen]
        begins = [len(prompt) for prompt in prompts]
        for step in range(tokens - 1):
            parts = [(row, begins[row] + step, [token]) for row, token in enumerate(chosen)]
            chosen = self._decode(parts)
            for answer, token in zip(answers, chosen, strict=True):
                answer.append(token)
        return answers

    def _use(self, adapter: str | None) -> None:
        held = [self._adapters[adapter]] if adapter else []
        adapters = (c.llama_adapter_lora_p_ctypes * 1)(*held)
        done = c.llama_set_adapters_lora(self._context, adapters, len(held), (ctypes.c_float * 1)(1.0))
        assert done == 0, "set"

    def _prefill(self, prompts: Sequence[list[int]]) -> list[int]:
        """Compute whole prompts, as many at once as fit; return the first token of each answer."""
        chosen: list[int] = []
        parts: list[tuple[int, int, list[int]]] = []
        for row, prompt in enumerate(prompts):
            if sum(len(part) for _, _, part in parts) + len(prompt) > _BATCH_TOKENS:
                chosen += self._decode(parts)
                parts = []
            parts.append((row, 0, prompt))
        return chosen + self._decode(parts)

    def _decode(self, parts: Sequence[tuple[int, int, list[int]]]) -> list[int]:
        """Compute parts of sequences (row, position, tokens); return the likeliest next token of each."""
        batch, at, last = self._batch, 0, []
        for row, position, tokens in parts:
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        done = c.llama_decode(self._context, batch)
        assert done == 0, "computed"
        # Rows of logits stand one after another, in the order of the parts.
        first = c.llama_get_logits_ith(self._context, last[0])
        logits = np.ctypeslib.as_array(first, shape=(len(last), self._vocab_size))
        return [int(token) for token in logits.argmax(axis=-1)]


def _load(model: c.llama_model_p, setup: Setup, folder: Path) -> c.llama_adapter_lora_p:
    assert setup.source, "made of it"
    path = gguf_files.write_adapter(setup.source, folder, setup.work / f"{folder.name}.gguf")
    adapter = c.llama_adapter_lora_init(model, str(path).encode())
    assert adapter, "loaded"
    return adapter


def _context_params(rows: int) -> c.llama_context_params:
    params = c.llama_context_default_params()
    params.n_ctx = rows * _ROW_TOKENS
    params.n_batch = params.n_ubatch = _BATCH_TOKENS
    params.n_seq_max = rows
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    return params
