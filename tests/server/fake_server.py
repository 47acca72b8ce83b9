"""`ovms-lora` with fake models: what a test starts as a process of its own.

Each step takes `STEP_SECONDS` of the environment, so that a test can do something in the middle of a stream; texts may
be `MODEL_LENGTH` long, and `MAX_WAITING` requests may wait and
`MAX_NUM_SEQS` sequences run.
"""

from __future__ import annotations

import os
import sys
import time

import ovms_lora.engine.model
from ovms_lora import cli
from ovms_lora.core.config import EngineOptions
from tests.fakes import FakeRunner
from tests.server.serving import FakeModels


def runner() -> FakeRunner:
    seconds = float(os.environ.get("STEP_SECONDS", "0"))
    return FakeRunner(num_blocks=1024, before_step=lambda _: time.sleep(seconds))


if __name__ == "__main__":
    ovms_lora.engine.model.load_model = FakeModels(  # type: ignore[assignment]
        options=EngineOptions(max_num_seqs=int(os.environ.get("MAX_NUM_SEQS", "256")), max_num_batched_tokens=256),
        runner=runner,
        max_model_len=int(os.environ.get("MODEL_LENGTH", "2048")),
        max_waiting=int(os.environ.get("MAX_WAITING", "0")) or None,
    )
    sys.exit(cli.main())
