"""Two adapters and the base, two sets of prompts and different sampling, in one call and so in one batch.

    .venv/bin/python examples/multi_lora_offline.py models/base_model

Without a folder it takes `models/base_model`, which `make demo` exports. The adapters are those in `examples/adapters`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ovms_lora import LLM, LoRARequest, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ROOT / "examples" / "adapters"

SQL_FORM = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE {table}\n\n question: {question} [/user] [assistant]"
)
SQL_PROMPTS = [
    SQL_FORM.format(table="ships (name VARCHAR, port VARCHAR)", question="Name the port for Aurora"),
    SQL_FORM.format(table="games (score VARCHAR, year INTEGER)", question="What is the score when the year is 1987?"),
]
TOOLS = [
    {
        "name": "set_timer",
        "description": "Sets a timer.",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
    {
        "name": "play_song",
        "description": "Plays a song.",
        "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    },
]
TOOLS_FORM = "<user>{request}</user>\n\n<tools>{tools}</tools>\n\n"
TOOLS_PROMPTS = [
    TOOLS_FORM.format(request=request, tools=json.dumps(TOOLS))
    for request in ("Set a timer for 12 minutes", "Play the song Silver River")
]


def main() -> None:
    """Load the model, answer both sets of prompts at once, print who answered what."""
    parser = argparse.ArgumentParser(description="Answer with two adapters and the base in one batch.")
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "base_model")
    sql = LoRARequest("sql", 1, str(ADAPTERS / "sql"))
    tools = LoRARequest("tools", 2, str(ADAPTERS / "tools"))
    exact = SamplingParams(temperature=0, max_tokens=48)
    creative = SamplingParams(temperature=0.4, top_p=0.9, max_tokens=64, seed=7, n=2)
    asked = [
        *((prompt, exact, sql) for prompt in SQL_PROMPTS),
        *((prompt, creative, tools) for prompt in TOOLS_PROMPTS),
        (SQL_PROMPTS[0], exact, None),
    ]
    prompts, sampling, adapters = zip(*asked, strict=True)
    with LLM(model=parser.parse_args().model, enable_lora=True, max_loras=2, max_lora_rank=16) as llm:
        outputs = llm.generate(prompts, sampling, lora_request=adapters)
    for output in outputs:
        name = output.lora_request.lora_name if output.lora_request else "base"
        for completion in output.outputs:
            print(f"{name}: {completion.text.strip()!r}")


if __name__ == "__main__":
    main()
