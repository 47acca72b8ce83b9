"""Writes adapter folders byte by byte, good and bad, without PEFT or safetensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ovms_lora.adapters.adapter import BaseLinears, LinearShape

PREFIX = "base_model.model."
WIDTH = 8
RANK = 2
Array = npt.NDArray[Any]
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "int64": "I64"}


def tiny_base(layers: int = 2, width: int = WIDTH) -> BaseLinears:
    """A base whose layers have a square q_proj and a v_proj of half the width."""
    shapes = {}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj"] = LinearShape(width, width)
        shapes[f"model.layers.{layer}.self_attn.v_proj"] = LinearShape(width // 2, width)
    return BaseLinears(shapes={**shapes, "lm_head": LinearShape(4 * width, width)})


def good_config(**changes: Any) -> dict[str, Any]:
    """A configuration that fits `good_tensors`, with changes."""
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **changes}


def good_tensors(base: BaseLinears | None = None, *, rank: int = RANK, dtype: Any = np.float32) -> dict[str, Array]:
    """Tensors for every q_proj and v_proj of the base, in PEFT's names."""
    rng = np.random.default_rng(7)
    tensors: dict[str, Array] = {}
    for module, shape in (base or tiny_base()).shapes.items():
        if module.endswith(("q_proj", "v_proj")):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = rng.normal(size=(rank, shape.in_features)).astype(dtype)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = rng.normal(size=(shape.out_features, rank)).astype(dtype)
    return tensors


def safetensors_header(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """The header that describes the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return header


def safetensors_bytes(tensors: Mapping[str, Array], header: Mapping[str, Any] | bytes | None = None) -> bytes:
    """A safetensors file; `header` replaces the one that is right."""
    described = safetensors_header(tensors) if header is None else header
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values())


def write_adapter(
    folder: Path,
    *,
    config: Mapping[str, Any] | bytes | None = None,
    tensors: Mapping[str, Array] | None = None,
    weights: bytes | None = None,
) -> Path:
    """Write an adapter folder: the good one, or with another configuration, other tensors or other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(good_config() if config is None else config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    data = safetensors_bytes(good_tensors() if tensors is None else tensors) if weights is None else weights
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def tolerance(dtype: Any, rank: int) -> float:
    """Relative error of a product of two matrices whose entries were rounded to `dtype`."""
    return 4 * float(ml_dtypes.finfo(np.dtype(dtype)).eps) * math.sqrt(rank)
