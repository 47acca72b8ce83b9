"""Training of one LoRA with PEFT: plain AdamW, the loss on the completion's tokens only.

Owns: how an example becomes tokens, the loop, and the adapter folder that is left.
Does not know: where examples come from, or how an adapter is judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from task import Example, Task

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_IGNORED = -100


def train_adapter(model: Any, tokenizer: Any, task: Task, *, seed: int) -> PeftModel:
    """Train the task's LoRA on top of `model`, print the loss now and then, and return the PEFT model in eval mode."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, _lora_config(task))
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=task.learning_rate, total_steps=task.steps, pct_start=0.1
    )
    examples = task.train_examples(task.steps * task.batch_size, seed)
    peft_model.train()
    recent: list[float] = []
    for step, batch in enumerate(_batches(examples, task.batch_size, Random(seed)), start=1):
        loss = _completion_loss(peft_model, *_to_tensors(tokenizer, batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 20 == 0:
            print(f"{task.name}: step {step}/{task.steps}, loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()
    peft_model.eval()
    _round_to_bf16(trainable)
    return peft_model


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors (bf16), and nothing else, into `folder`."""
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    peft_model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # PEFT writes the path it was given, and the modules in the order of a set.
    config["base_model_name_or_path"] = BASE_MODEL
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _lora_config(task: Task) -> LoraConfig:
    return LoraConfig(
        r=task.rank,
        lora_alpha=task.lora_alpha,
        target_modules=list(task.target_modules),
        layers_to_transform=None if task.layers is None else list(task.layers),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _batches(examples: Sequence[Example], size: int, random: Random) -> Iterator[list[Example]]:
    order = list(examples)
    random.shuffle(order)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _to_tensors(tokenizer: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both [batch, longest], padded on the right; only completions have labels."""
    rows, labels = [], []
    for example in batch:
        # Two calls, because a server tokenises the prompt by itself: a token must not reach across the border.
        prompt = tokenizer(example.prompt)["input_ids"]
        completion = [*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([_IGNORED] * len(prompt) + completion))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(labels, True, _IGNORED)


def _completion_loss(peft_model: PeftModel, token_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over the labelled tokens.

    Padding on the right needs no mask under causal attention, and the output layer, the dearest one of a small model,
    runs only where there is a label.
    """
    model = peft_model.get_base_model()
    hidden = model.model(input_ids=token_ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != _IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def _round_to_bf16(parameters: Sequence[torch.Tensor]) -> None:
    # So that what is evaluated is what the file will hold.
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
