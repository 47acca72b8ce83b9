"""PEFT adapter folders that are to be merged: what can be said about one before torch is loaded.

Owns: which folders are refused, and the comparison of an adapter's tensor shapes with the base's.
Does not know: how PEFT merges. Adapters applied at run time have stricter rules, in `ovms_lora.adapters`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ovms_lora.core.errors import ExportError
from ovms_lora.export.digests import files_digest
from ovms_lora.export.source import find_folder, read_json, tensor_shapes

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
FILES: Final = (CONFIG, WEIGHTS)
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_LORA_TENSOR: Final = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
# Where the weights of a tied head are.
_EMBEDDINGS: Final = ("model.embed_tokens.weight", "transformer.wte.weight")

_VOCABULARY: Final = ("lm_head", "embed_tokens", "wte")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """An adapter folder that PEFT can be given; `weight` multiplies its change."""

    given: str
    path: Path
    config: dict[str, Any]
    weight: float = 1.0

    @property
    def digest(self) -> str:
        """The identity of its content."""
        return files_digest([self.path / CONFIG, self.path / WEIGHTS], self.path)


def find_adapter(given: str, weight: float = 1.0) -> PeftFolder:
    """Find an adapter folder, on disk or on the hub. Raises ExportError with what is wrong with it."""
    path = find_folder(given, "adapter", FILES)
    if not (path / CONFIG).is_file():
        raise ExportError(f"{given} is not an adapter: it has no {CONFIG}", hint="an adapter is what PEFT saves")
    config = read_json(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        pickled = next((name for name in _PICKLES if (path / name).is_file()), None)
        if pickled:
            raise ExportError(
                f"adapter {given} is pickled ({pickled}), and reading a pickle runs its code",
                hint=f"save it as {WEIGHTS}",
            )
        raise ExportError(f"adapter {given} has no {WEIGHTS}", hint="an adapter is what PEFT saves")
    _check_config(given, config, weight)
    return PeftFolder(given, path, config, weight)


def check_fits(adapter: PeftFolder, base: Shapes, *, resized: bool = False) -> None:
    """Compare the adapter's LoRA tensors with the base's, by name and shape.

    Raises ExportError naming the first tensor that does not fit. An adapter of which no tensor is found is let pass,
    for its base may keep its weights under other names than its modules; PEFT knows when the model is loaded. With
    `resized` the base will have another vocabulary, so that head and embeddings are not compared.
    """
    shapes = tensor_shapes([adapter.path / WEIGHTS])
    linears = {name: (match["path"], match["part"]) for name in shapes if (match := _LORA_TENSOR.fullmatch(name))}
    if resized:
        linears = {name: linear for name, linear in linears.items() if not linear[0].endswith(_VOCABULARY)}
    found = {path: _base_shape(path, base) for path, _ in linears.values()}
    if linears and not any(found.values()):
        return
    for name, (path, part) in linears.items():
        shape = found[path]
        if shape is None:
            raise _misfit(adapter, f"{name} has no layer {path} there")
        axis, base_axis = (1, 1) if part == "A" else (0, 0)
        if adapter.config.get("fan_in_fan_out"):
            base_axis = 1 - base_axis
        if len(shapes[name]) == 2 == len(shape) and shapes[name][axis] != shape[base_axis]:
            raise _misfit(adapter, f"{name} is {_shown(shapes[name])}, the layer's weight {_shown(shape)}")


def _misfit(adapter: PeftFolder, reason: str) -> ExportError:
    return ExportError(
        f"adapter {adapter.given} does not fit the base model: {reason}",
        hint=f"it was trained for {adapter.config.get('base_model_name_or_path') or 'another base'}",
    )


def _check_config(given: str, config: dict[str, Any], weight: float) -> None:
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ExportError(f"adapter {given} is for {config['task_type']}, not for text generation")
    if config.get("megatron_config"):
        # PEFT would import the module that the file names.
        raise ExportError(f"adapter {given} sets megatron_config, which is not supported")
    scalable = config.get("peft_type") == "LORA" and not config.get("use_dora")
    if weight != 1.0 and not scalable:
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ExportError(
            f"adapter {given} is {kind}, which cannot be merged at weight {weight:g}", hint="leave =WEIGHT out"
        )


def _base_shape(path: str, base: Shapes) -> tuple[int, ...] | None:
    direct = base.get(f"{path}.weight")
    if direct is None and path == "lm_head":
        return next((base[name] for name in _EMBEDDINGS if name in base), None)
    return direct


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
