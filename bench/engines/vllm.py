"""vLLM's CPU backend on the weights that the model was exported from: it mixes adapters in one batch, as we do.

Runs in an environment of its own (`make vllm`), since it wants other versions of what is installed here; so nothing of
ovms_lora is imported. Computes in bfloat16 where the processor has instructions for it, else in float32.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

# Read when it is imported. In one process, so that it stands still as a whole when it is stopped.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import vllm
from vllm.lora.request import LoRARequest

from bench.engines.job import Answer, Job, Setup

_ROW_TOKENS = 256  # prompt and answer of a row
_MAX_RANK = 16


class Vllm:
    """A model, with adapters or without."""

    def __init__(self, setup: Setup) -> None:
        assert setup.source, "loaded from it"
        self._adapters = {
            name: LoRARequest(name, number, str(folder))
            for number, (name, folder) in enumerate(setup.adapters.items(), start=1)
        }
        adapted = {"enable_lora": True, "max_loras": len(self._adapters), "max_lora_rank": _MAX_RANK}
        self._llm = vllm.LLM(
            str(setup.source),
            dtype="bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "float32",
            max_model_len=_ROW_TOKENS,
            max_num_seqs=setup.max_batch,
            skip_tokenizer_init=True,
            **(adapted if self._adapters else {}),
        )

    def run(self, job: Job) -> Answer:
        """Do a job, all rows together."""
        begin = time.perf_counter()
        sampling = vllm.SamplingParams(temperature=0, max_tokens=job.tokens, ignore_eos=True, detokenize=False)
        found = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in job.prompts],
            sampling,
            lora_request=[self._adapters[name] if name else None for name in job.adapters] if self._adapters else None,
            use_tqdm=False,
        )
        seconds = time.perf_counter() - begin
        return Answer([list(each.outputs[0].token_ids) for each in found], seconds)
