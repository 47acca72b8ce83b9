"""SmolLM2 through exporter and engine: the same tokens as transformers, and the demo's answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms_lora.engine.lora_config import LoraConfig
from tests.real.client import ADAPTERS, PROMPT, client

pytestmark = [
    pytest.mark.real,
    # Of the exporter's libraries, on Python's own deprecations and on their tracing of PyTorch code.
    pytest.mark.filterwarnings("ignore"),
]

NEW_TOKENS = 24
SUBJECTS = ("The king", "A computer", "Two rivers and a hill", "In 1815 the 3 ships", "Ünïcödé 漢字", "def add(a, b):")


def test_a_batch_gives_the_tokens_of_transformers(exact_base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from ovms_lora.export.gguf import to_hf_folder
    from tests.real.exports import gguf

    to_hf_folder(gguf(), tmp_path)
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
        blend = ours.model.lora.blend([("sql", None), ("tools", None)])
        mixed = ours.generate(
            {
                "sql": (prompt, sql),
                "tools": (prompt, tools),
                "base": (prompt, ()),
                "blend": (prompt, blend),
            }
        )
        texts = {name: ours.model.tokenizer.decode(tokens) for name, tokens in mixed.items()}
    assert texts["sql"].strip().startswith("SELECT")
    assert "WHERE airport = 'lilongwe" in texts["sql"]
    assert "lilongwe" not in texts["base"]
