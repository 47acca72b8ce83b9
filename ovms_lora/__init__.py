"""ovms-lora: serve LLMs with many LoRA adapters on OpenVINO.

The names of the Python API are loaded when they are first used, so that importing any part of the package stays quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovms_lora.core.sampling_params import SamplingParams
    from ovms_lora.llm import LLM
    from ovms_lora.offline.lora_request import LoRARequest
    from ovms_lora.offline.outputs import CompletionOutput, Logprob, RequestOutput

__version__ = "0.1.0"

__all__ = ["LLM", "CompletionOutput", "LoRARequest", "Logprob", "RequestOutput", "SamplingParams", "__version__"]

# Imported, this package would report every import of OpenVINO to its makers, from a process of its own. Without it
# OpenVINO and NNCF use their stand-ins, which report nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_HOMES = {
    "LLM": "ovms_lora.llm",
    "CompletionOutput": "ovms_lora.offline.outputs",
    "LoRARequest": "ovms_lora.offline.lora_request",
    "Logprob": "ovms_lora.offline.outputs",
    "RequestOutput": "ovms_lora.offline.outputs",
    "SamplingParams": "ovms_lora.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
