"""ovms-lora's engine, asked directly; rows with different adapters share its steps."""

from __future__ import annotations

from bench.engines.job import Answer, Job, Setup
from bench.workload import Server


class Own:
    """A model with runtime adapters, or plain where there are none."""

    def __init__(self, setup: Setup) -> None:
        self._server = Server(setup.model, setup.adapters or None, max_loras=max(len(setup.adapters), 1))

    def run(self, job: Job) -> Answer:
        """Do a job."""
        uses = [self._server.use(name) if name else () for name in job.adapters]
        found = self._server.run(job.prompts, uses, max_tokens=job.tokens)
        return Answer(found.tokens, found.seconds)
