"""`ovms-lora` with fake models: what a test starts as a process of its own.

Each step takes `STEP_SECONDS` of the environment, so that a test can do something in the middle of a stream; texts may
be `MODEL_LENGTH` long, `MAX_WAITING` requests may wait and `MAX_NUM_SEQS` sequences run. Prompts that begin with
`hang`, `fail` or `full` are steps that hang, fail or find no memory. `HEARTBEAT_SECONDS` is how long a step may take.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import ovms_lora.engine.model
from ovms_lora import cli
from ovms_lora.core.config import EngineOptions
from ovms_lora.engine.device import device_error
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.server.options import Limits
from tests.fakes import FakeRunner
from tests.server.serving import FakeModels


def runner() -> FakeRunner:
    seconds = float(os.environ.get("STEP_SECONDS", "0"))

    def before_step(chunks: Sequence[Chunk]) -> None:
        time.sleep(seconds)
        for chunk in chunks:
            fault = "".join(map(chr, chunk.sequence.request.prompt_token_ids[:4]))
            if fault == "hang":
                time.sleep(3600)
            if fault == "fail":
                raise device_error(RuntimeError("Exception from src/inference/infer_request.cpp:79"), "a step")
            if fault == "full":
                raise device_error(RuntimeError("bad allocation"), "a step")

    return FakeRunner(num_blocks=1024, before_step=before_step)


if __name__ == "__main__":
    limits = Limits.__init__.__kwdefaults__
    assert limits
    limits["heartbeat_seconds"] = float(os.environ.get("HEARTBEAT_SECONDS", "60"))
    ovms_lora.engine.model.load_model = FakeModels(  # type: ignore[assignment]
        options=EngineOptions(max_num_seqs=int(os.environ.get("MAX_NUM_SEQS", "256")), max_num_batched_tokens=256),
        runner=runner,
        max_model_len=int(os.environ.get("MODEL_LENGTH", "2048")),
        max_waiting=int(os.environ.get("MAX_WAITING", "0")) or None,
    )
    sys.exit(cli.main())
