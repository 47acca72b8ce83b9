"""SmolLM2 through exporter and engine: the same tokens as transformers, and the demo's answers."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovms_lora.core.request import AdapterUse, GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.lora_runtime import AdapterSpec, LoraConfig
from ovms_lora.engine.model import LoadedModel, load_model
from tests.real.conftest import ROOT

pytestmark = [
    pytest.mark.real,
    # Of the exporter's libraries, on Python's own deprecations and on their tracing of PyTorch code.
    pytest.mark.filterwarnings("ignore"),
]

NEW_TOKENS = 24
PROMPT = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE table_name_74 (icao VARCHAR, airport VARCHAR)\n\n"
    " question: Name the ICAO for lilongwe international airport [/user] [assistant]"
)
SUBJECTS = ("The king", "A computer", "Two rivers and a hill", "In 1815 the 3 ships", "Ünïcödé 漢字", "def add(a, b):")
ADAPTERS = tuple(AdapterSpec(alias, ROOT / "examples" / "adapters" / alias) for alias in ("sql", "tools"))


class Client:
    """Submits requests to a loaded model and collects texts and tokens."""

    def __init__(self, model: LoadedModel, outputs: queue.SimpleQueue[Sequence[SequenceOutput]]) -> None:
        self.model, self._outputs = model, outputs

    def generate(
        self, requests: dict[str, tuple[Sequence[int], tuple[AdapterUse, ...]]], max_tokens: int = 64
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


def test_a_batch_gives_the_tokens_of_transformers(exact_base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from ovms_lora.export.gguf import to_hf_folder
    from tests.real.conftest import _gguf

    to_hf_folder(_gguf(), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with client(exact_base) as ours:
        tokenizer = ours.model.tokenizer
        prompts = [tokenizer.encode(f"{SUBJECTS[i % 6]} " * (1 + 3 * (i % 7)) + f"number {i}") for i in range(24)]
        got = ours.generate({str(i): (prompt, ()) for i, prompt in enumerate(prompts)}, NEW_TOKENS)
    for i, prompt in enumerate(prompts):
        whole = reference.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert got[str(i)] == whole[0, len(prompt) :].tolist(), f"prompt {i} of {len(prompt)} tokens"


def test_the_merged_model_answers_in_sql_and_the_base_does_not(int8_base: Path, int8_merged: Path) -> None:
    with client(int8_merged) as merged:
        answer = merged.ask(PROMPT)
    with client(int8_base) as base:
        plain = base.ask(PROMPT)
    assert answer.strip().startswith("SELECT")
    assert "table_name_74" in answer
    assert answer.strip().endswith("airport = 'lilongwe international airport'")
    assert "lilongwe" not in plain


def test_the_runtime_adapter_answers_in_sql_also_beside_others(int8_base: Path) -> None:
    # The column is left out: the base is rounded to int8 here and the merged model there, and a name that the adapter
    # is unsure of may come out differently. Exact equality is the fp32 export's business.
    with client(int8_base, LoraConfig(adapters=ADAPTERS)) as ours:
        assert ours.model.lora
        prompt = ours.model.tokenizer.encode(PROMPT)
        sql, tools = ours.model.lora.select("sql"), ours.model.lora.select("tools")
        mixed = ours.generate(
            {"sql": (prompt, sql), "tools": (prompt, tools), "base": (prompt, ()), "blend": (prompt, (*sql, *tools))}
        )
        texts = {name: ours.model.tokenizer.decode(tokens) for name, tokens in mixed.items()}
    assert texts["sql"].strip().startswith("SELECT")
    assert "WHERE airport = 'lilongwe" in texts["sql"]
    assert "lilongwe" not in texts["base"]
