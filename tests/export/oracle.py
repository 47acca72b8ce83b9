"""Next-token log-probabilities: of an exported IR, and of PyTorch with PEFT, which says what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
TOKENS = np.random.default_rng(7).integers(2, 300, size=(1, 33), dtype=np.int64)


def of_ir(folder: Path, tokens: npt.NDArray[np.int64] = TOKENS) -> Array:
    """Run the IR in float32 on TOKENS, or other tokens [1, length]."""
    from ovms_lora.engine.device import openvino_core

    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(folder / "openvino_model.xml", "CPU", properties)
    length = tokens.shape[1]
    inputs = {
        "input_ids": tokens,
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return _log_softmax(compiled.create_infer_request().infer(inputs)[0][0])


def of_torch(model: Any) -> Array:
    """Run a PyTorch model, PEFT or plain, on TOKENS."""
    import torch

    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(TOKENS)).logits[0]
    return _log_softmax(logits.float().numpy())


def plain(base: Path) -> Any:
    """Load the base in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def with_adapters(base: Path, *adapters: tuple[Path, float]) -> Any:
    """Load base and adapters, all active at once and unmerged: the sum of their changes, each times its weight."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    (first, _), *others = adapters
    model = PeftModel.from_pretrained(plain(base), str(first), adapter_name="0")
    for number, (folder, _) in enumerate(others, start=1):
        model.load_adapter(str(folder), adapter_name=str(number))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] *= adapters[int(name)][1]
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return model


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
