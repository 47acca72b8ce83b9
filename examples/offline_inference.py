"""Continue a list of prompts in this process, without a server.

    .venv/bin/python examples/offline_inference.py models/base_model

Without a folder it takes `models/base_model`, which `make demo` exports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ovms_lora import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["Hello, my name is", "The capital of France is", "The three primary colours are", "The future of AI is"]


def main() -> None:
    """Load the model, answer all prompts in one batch, print prompts and texts."""
    parser = argparse.ArgumentParser(description="Continue four prompts.")
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "base_model")
    sampling = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=0)
    with LLM(model=parser.parse_args().model) as llm:
        outputs = llm.generate(PROMPTS, sampling)
    for output in outputs:
        print(f"Prompt:    {output.prompt!r}\nGenerated: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
