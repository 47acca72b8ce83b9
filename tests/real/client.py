"""Asks a real model that was loaded with or without adapters, in one batch."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ovms_lora.core.request import AdapterUse, GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.lora_config import AdapterSpec, LoraConfig
from ovms_lora.engine.model import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = tuple(AdapterSpec(alias, ROOT / "examples" / "adapters" / alias) for alias in ("sql", "tools"))
PROMPT = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE table_name_74 (icao VARCHAR, airport VARCHAR)\n\n"
    " question: Name the ICAO for lilongwe international airport [/user] [assistant]"
)


class Client:
    """Submits requests to a loaded model and collects texts and tokens."""

    def __init__(self, model: LoadedModel, outputs: queue.SimpleQueue[Sequence[SequenceOutput]]) -> None:
        self.model, self._outputs = model, outputs

    def generate(
        self, requests: Mapping[str, tuple[Sequence[int], tuple[AdapterUse, ...]]], max_tokens: int = 64
    ) -> dict[str, list[int]]:
        """Run all requests together; return the generated tokens by id."""
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        for request_id, (prompt, adapters) in requests.items():
            self.model.engine.submit(GenerationRequest(request_id, tuple(prompt), sampling, adapters))
        tokens: dict[str, list[int]] = {request_id: [] for request_id in requests}
        running = len(requests)
        while running:
            for output in self._outputs.get(timeout=60):
                assert output.error is None
                tokens[output.request_id] += output.token_ids
                running -= output.finished
        return tokens

    def ask(self, prompt: str, adapters: tuple[AdapterUse, ...] = ()) -> str:
        """Return the text that follows one prompt."""
        tokenizer = self.model.tokenizer
        return tokenizer.decode(self.generate({"r": (tokenizer.encode(prompt), adapters)})["r"])


@contextmanager
def client(folder: Path, lora: LoraConfig | None = None) -> Iterator[Client]:
    outputs: queue.SimpleQueue[Sequence[SequenceOutput]] = queue.SimpleQueue()
    model = load_model(folder, deliver=outputs.put, lora=lora)
    try:
        yield Client(model, outputs)
    finally:
        model.engine.stop()
