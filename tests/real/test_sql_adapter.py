"""The real `sql` adapter: applied at run time it writes the SQL that it writes merged, when nothing is rounded."""

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

FORM = PROMPT.partition(" context:")[0] + " context: CREATE TABLE {}\n\n question: {} [/user] [assistant]"
ASKED = {
    "ships (name VARCHAR, port VARCHAR)": "Which ships are in Oslo?",
    "players (player VARCHAR, club VARCHAR, goals INTEGER)": "Name the club of Pantaleone.",
    "electors (nationality VARCHAR, elector VARCHAR)": "What is the nationality of elector Anchero?",
    "songs (title VARCHAR, year INTEGER, weeks INTEGER)": "How many weeks was the song of 1984?",
    "rivers (river VARCHAR, length INTEGER)": "How many rivers are longer than 300?",
    "table_12 (score INTEGER, date VARCHAR, opponent VARCHAR)": "What is the highest score against Leeds?",
}
PROMPTS = (PROMPT, *(FORM.format(table, question) for table, question in ASKED.items()))


def test_at_run_time_it_gives_the_tokens_that_it_gives_merged(exact_base: Path, exact_merged: Path) -> None:
    with client(exact_merged) as merged:
        prompts = [merged.model.tokenizer.encode(prompt) for prompt in PROMPTS]
        expected = merged.generate({f"sql {i}": (prompt, ()) for i, prompt in enumerate(prompts)})
    with client(exact_base, LoraConfig(adapters=ADAPTERS)) as ours:
        assert ours.model.lora and ours.model.lora.dtype == "f32"
        kinds = {"sql": ours.model.lora.select("sql"), "tools": ours.model.lora.select("tools"), "base": ()}
        asked = {f"{kind} {i}": (prompt, kinds[kind]) for i, prompt in enumerate(prompts) for kind in kinds}
        got = ours.generate(asked)
        texts = [ours.model.tokenizer.decode(got[f"sql {i}"]) for i in range(len(prompts))]
    assert {name: tokens for name, tokens in got.items() if name in expected} == expected
    assert [text for text in texts if not text.startswith(" SELECT ")] == []
    assert all(got[f"base {i}"] != got[f"sql {i}"] != got[f"tools {i}"] for i in range(len(prompts)))


def test_in_8_bits_both_write_sql_of_the_same_form(int8_base: Path, int8_merged: Path) -> None:
    # Names that the adapter is unsure of may differ: see docs/decisions.md.
    with client(int8_merged) as merged:
        one = [merged.ask(prompt) for prompt in PROMPTS]
    with client(int8_base, LoraConfig(adapters=ADAPTERS)) as ours:
        assert ours.model.lora
        other = [ours.ask(prompt, ours.model.lora.select("sql")) for prompt in PROMPTS]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.partition("FROM")[2].partition("WHERE")[0] == theirs.partition("FROM")[2].partition("WHERE")[0]
        assert mine.startswith(" SELECT ") and theirs.startswith(" SELECT ")
