"""How far the exported IR is from the PyTorch model that it was made of, in next-token distributions.

Owns: the prompts, the two computations, and the figures of their difference.
Does not know: which difference is too large for a user, or where the figures are kept.

The PyTorch model computes in the precision that it was loaded in, adapters merged. The IR computes on the CPU in
float32, without quantised activations: the figures are about the exported weights, not about a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ovms_lora.core.errors import ExportError
from ovms_lora.export.convert import MODEL
from ovms_lora.export.device import openvino_core
from ovms_lora.export.ir_inputs import inputs_of
from ovms_lora.export.manifest import Drift

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Prose, dialogue, code, queries, numbers and other scripts: where weights may suffer differently.
PROMPTS: Final = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is",
    "[user] How long should I boil an egg so that it stays soft inside? [/user] [assistant] Boil it for",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "CREATE TABLE airports (icao VARCHAR, city VARCHAR); SELECT icao FROM airports WHERE city =",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "unit":',
    "If a train leaves at 9:40 and takes 2 hours and 35 minutes, it arrives at",
    "Es war einmal ein König, der hatte drei Töchter. Die jüngste von ihnen",
    "Water boils at 100 degrees Celsius because at that temperature the pressure of its vapour",
)
_TOKENS: Final = 32  # of each prompt: with a large vocabulary, that bounds what is kept
_EXACT: Final = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}

LogProbs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """One prompt's tokens, and the log-probabilities [tokens, vocabulary] of what follows each."""

    token_ids: list[int]
    log_probs: LogProbs


def expect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Expected]:
    """Compute what the PyTorch model says to the prompts. Raises ExportError if that is not finite."""
    import torch

    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            token_ids = tokenizer(prompt)["input_ids"][:_TOKENS]
            logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
            found.append(Expected(token_ids, _log_softmax(logits.float().numpy(), "the PyTorch model")))
    return found


def measure_drift(folder: Path, expected: list[Expected]) -> Drift:
    """Run the IR in `folder` on the same tokens and compare. Raises ExportError if its logits are not finite."""
    compiled = openvino_core().compile_model(folder / MODEL, "CPU", _EXACT)
    pairs = [(want.log_probs, _answer(compiled, want.token_ids)) for want in expected]
    divergences = np.concatenate([_divergences(want, got) for want, got in pairs])
    agreements = np.concatenate([want.argmax(-1) == got.argmax(-1) for want, got in pairs])
    return Drift(
        mean_kl=float(divergences.mean()),
        max_kl=float(divergences.max()),
        top1_agreement=float(agreements.mean()),
        positions=len(divergences),
    )


def _answer(compiled: Any, token_ids: list[int]) -> LogProbs:
    logits = compiled.create_infer_request().infer(inputs_of(compiled, token_ids))["logits"][0]
    return _log_softmax(logits, "the exported model")


def _divergences(want: LogProbs, got: LogProbs) -> npt.NDArray[np.float64]:
    """Return the Kullback-Leibler divergence of each position in nats: Σ p · (log p - log q), p of PyTorch."""
    rows: Iterator[tuple[LogProbs, LogProbs]] = zip(want, got, strict=True)
    return np.array([max(0.0, float(np.sum(np.exp(p) * (p - q), dtype=np.float64))) for p, q in rows])


def _log_softmax(logits: npt.NDArray[np.float32], whose: str) -> LogProbs:
    if not np.isfinite(logits).all():
        raise ExportError(f"{whose} computes numbers that are not finite", hint="is the source whole and trained?")
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)
