"""Ray Serve LLM's example of many adapters, with our names: one base, adapters found by name, the openai client.

    make demo                                  once: exports models/base_model
    .venv/bin/python examples/ray_multi_lora.py

Each adapter is a folder below `--adapters`; its id is `<base>:<folder>`. It is loaded by the replica that gets the
first request for it, and further ones go there as long as it has room.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import ray
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from ray import serve

from ovms_lora.scale import build_app

ROOT = Path(__file__).resolve().parent.parent
BASE = "smollm2"
QUESTION = "Write a SQL query: how many users are there? The table is users (id INTEGER, name VARCHAR)."


def main(words: list[str]) -> int:
    """Deploy, ask the base and each adapter, take it down; return the exit code."""
    args = _parser().parse_args(words)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": args.port})
    serve.run(
        build_app(
            {
                "model_path": str(args.model_path),
                "model_name": BASE,
                "enable_lora": True,
                "dynamic_lora_loading_path": str(args.adapters),
                "max_num_adapters_per_replica": 4,
                "min_replicas": 1,
                "max_replicas": 2,
            }
        )
    )
    client = OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none is needed")
    for model in ids(client):
        print(f"{model}: ", end="")
        for text in answer(client, model):
            print(text, end="", flush=True)
        print()
    serve.shutdown()  # type: ignore[no-untyped-call]
    return 0


def ids(client: OpenAI) -> list[str]:
    """Return the id of the base, and `<base>:<adapter>` of each adapter that there is, loaded or not."""
    cards = client.models.list().data
    parents = {card.id: (card.model_extra or {}).get("parent") for card in cards}
    return [f"{parent}:{name}" if parent else name for name, parent in parents.items()]


def answer(client: OpenAI, model: str) -> Iterator[str]:
    """Yield the pieces of an answer as they come."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        for choice in chunk.choices:
            yield choice.delta.content or ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serve a base with many adapters on Ray Serve, and ask it.")
    parser.add_argument("--model_path", metavar="DIR", type=Path, default=ROOT / "models" / "base_model")
    parser.add_argument("--adapters", metavar="DIR", type=Path, default=ROOT / "examples" / "adapters")
    parser.add_argument("--port", metavar="N", type=int, default=8000)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
