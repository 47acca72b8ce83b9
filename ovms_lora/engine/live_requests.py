"""LiveRequests: the requests that the engine has taken in and that have not ended, with their sequences.

Owns who belongs together: sequences of one request are begun, and when it fails ended, as one. Belongs to the engine
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.core.request import GenerationRequest, SequenceOutput
from ovms_lora.engine.beam import BeamSearch
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.scheduler import Scheduler
from ovms_lora.engine.sequence import Fork, Sequence


@dataclass(frozen=True, slots=True, eq=False)
class LiveRequest:
    """A request and those of its sequences that have not ended; with beam search they are the beams of now."""

    request: GenerationRequest
    sequences: list[Sequence]
    search: BeamSearch | None = None

    def failed(self, error: OvmsLoraError) -> list[SequenceOutput]:
        """Return what tells of an error all who still wait for an answer."""
        open_ones = range(self.request.sampling.n) if self.search else [sequence.index for sequence in self.sequences]
        return failures(self.request, open_ones, error)


def failures(request: GenerationRequest, indices: Iterable[int], error: OvmsLoraError) -> list[SequenceOutput]:
    """Return an error for each of these sequences of a request."""
    return [SequenceOutput(request.request_id, index, error=error) for index in indices]


class LiveRequests:
    """Begins and ends requests in scheduler and output together; `on_end` is called with the id of each that ends."""

    def __init__(self, scheduler: Scheduler, output: OutputProcessor, on_end: Callable[[str], None]) -> None:
        self._scheduler = scheduler
        self._output = output
        self._on_end = on_end
        self._live: dict[str, LiveRequest] = {}

    def begin(self, request: GenerationRequest) -> None:
        """Queue the sequences of a new request."""
        searches = request.sampling.beam_width > 1
        sequences = [Sequence(request, index) for index in range(1 if searches else request.sampling.n)]
        search = BeamSearch(sequences[0], self._output) if searches else None
        self._live[request.request_id] = LiveRequest(request, sequences, search)
        for sequence in sequences:
            self._output.add(sequence)
            self._scheduler.add(sequence)

    def search_of(self, sequence: Sequence) -> BeamSearch | None:
        """Return the beam search that a sequence belongs to; None when it samples, or has ended."""
        live = self._live.get(sequence.request.request_id)
        return live.search if live else None

    def replace(self, request_id: str, forks: list[Fork]) -> None:
        """Let new beams go on in the place of the present ones."""
        sequences = self._live[request_id].sequences
        self._scheduler.replace(sequences, forks)
        for parent in sequences:
            self._output.drop(parent)
        sequences[:] = [fork.child for fork in forks]

    def drop(self, sequence: Sequence) -> None:
        """Take out a sequence that has had its last output."""
        request_id = sequence.request.request_id
        siblings = self._live[request_id].sequences
        siblings.remove(sequence)
        if not siblings:
            del self._live[request_id]
            self._on_end(request_id)
        self._scheduler.finish(sequence)
        self._output.drop(sequence)

    def end(self, request_id: str) -> None:
        """Take out a request that is answered, or that nobody waits for; unknown ones have ended already."""
        live = self._live.get(request_id)
        if live:
            for sequence in list(live.sequences):
                self.drop(sequence)

    def fail(self, request_ids: Iterable[str], error: OvmsLoraError) -> list[SequenceOutput]:
        """Take out whole requests, and return the error for all their sequences."""
        outputs: list[SequenceOutput] = []
        for request_id in dict.fromkeys(request_ids):
            if request_id in self._live:
                outputs += self._live[request_id].failed(error)
                self.end(request_id)
        return outputs

    def overdue(self, now: float) -> list[str]:
        """Return the ids of the requests whose deadline has passed."""
        deadlines = [(request_id, live.request.deadline) for request_id, live in self._live.items()]
        return [request_id for request_id, deadline in deadlines if deadline is not None and now > deadline]

    def abandon(self, error: OvmsLoraError) -> list[SequenceOutput]:
        """Return the error for everyone, and leave scheduler and output as they are: they are used no more."""
        outputs = [output for live in self._live.values() for output in live.failed(error)]
        self._live.clear()
        return outputs
