"""From the names of tensors to pairs of A and B per module.

Owns the forms in which PEFT and others write those names (with and without PEFT's prefix, with and without the
adapter's name) and which other tensors an adapter file may hold: none that would change the answer. Looks at names and
shapes only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ovms_lora.adapters.quoting import quoted
from ovms_lora.adapters.safetensors_file import TensorInfo
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FROZEN_COPY = ".base_layer.weight"
_PEFT_PREFIX = "base_model.model."
# A decoder block's number is the first in a path; nine digits are more than any model has.
_BLOCK = re.compile(r"(?P<head>\D*?\.)(?P<number>\d{1,9})(?P<tail>\..+)")


@dataclass(frozen=True, slots=True)
class TensorPair:
    """The two tensors of one module: A is [r, in], B is [out, r]."""

    module: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """What a file holds: pairs in the order of the file, and the copies of frozen base weights that PEFT adds.

    PEFT saves the untouched weight of a targeted `lm_head` beside the LoRA; `frozen` has those, by module.
    """

    pairs: tuple[TensorPair, ...]
    frozen: dict[str, TensorInfo]


def pair_tensors(tensors: Iterable[TensorInfo], modules: Collection[str] | None) -> NamedTensors:
    """Sort tensors into pairs. `modules` are the base's linear layers; None takes any.

    Raises AdapterError that names the tensor: UNSUPPORTED (biases, DoRA magnitudes, embeddings, saved modules), MODULE
    (no such layer, or two tensors for one place), BASE_MISMATCH (a layer beyond the base's last), INCOMPLETE.
    """
    sides: dict[str, dict[str, TensorInfo]] = {}
    frozen: dict[str, TensorInfo] = {}
    adapters: set[str | None] = set()
    for info in tensors:
        if info.name.endswith(_FROZEN_COPY):
            frozen[_module(info.name, info.name.removesuffix(_FROZEN_COPY), modules)] = info
            continue
        match = _LORA.fullmatch(info.name)
        if match is None:
            raise _not_lora(info.name)
        adapters.add(match["adapter"])
        module = _module(info.name, match["module"], modules)
        if sides.setdefault(module, {}).setdefault(match["side"], info) is not info:
            raise AdapterError(AdapterErrorCode.MODULE, f"tensor {quoted(info.name)} is not the only one for its layer")
    if len(adapters) > 1:
        raise AdapterError(AdapterErrorCode.MODULE, "the tensors belong to more than one adapter")
    for module, info in frozen.items():
        if module not in sides:
            raise _unsupported(info.name)
    return NamedTensors(tuple(_pair(module, both) for module, both in sides.items()), frozen)


def _pair(module: str, sides: dict[str, TensorInfo]) -> TensorPair:
    if len(sides) == 1:
        ((side, info),) = sides.items()
        other = "B" if side == "A" else "A"
        raise AdapterError(AdapterErrorCode.INCOMPLETE, f"tensor {quoted(info.name)} has no lora_{other} beside it")
    return TensorPair(module, sides["A"], sides["B"])


def _module(name: str, path: str, modules: Collection[str] | None) -> str:
    """Return the base's layer that `path`, the part of `name` before `.lora_`, means."""
    stripped = path.removeprefix(_PEFT_PREFIX)
    if modules is None or stripped in modules:
        return stripped
    # Some tools write `model.` once more than the base has it.
    others = {
        other for other in (path, path.removeprefix("model."), stripped.removeprefix("model.")) if other in modules
    }
    if len(others) == 1:
        return others.pop()
    if _is_beyond(stripped, modules):
        raise AdapterError(
            AdapterErrorCode.BASE_MISMATCH,
            f"tensor {quoted(name)} is for a layer beyond the base's last",
            hint="the adapter was trained on a larger base",
        )
    raise AdapterError(AdapterErrorCode.MODULE, f"tensor {quoted(name)} matches no linear layer of the base")


def _is_beyond(path: str, modules: Collection[str]) -> bool:
    """Whether the base has this layer in its blocks, but not as many blocks."""
    match = _BLOCK.fullmatch(path)
    if match is None:
        return False
    blocks = (_BLOCK.fullmatch(module) for module in modules)
    numbers = [
        int(block["number"]) for block in blocks if block and block.group("head", "tail") == match.group("head", "tail")
    ]
    return bool(numbers) and int(match["number"]) > max(numbers)


def _not_lora(name: str) -> AdapterError:
    if ".lora_" in name or name.endswith((".weight", ".bias")) or ".modules_to_save." in name:
        return _unsupported(name)
    return AdapterError(AdapterErrorCode.MODULE, f"tensor {quoted(name)} is no part of a LoRA")


def _unsupported(name: str) -> AdapterError:
    return AdapterError(
        AdapterErrorCode.UNSUPPORTED,
        f"tensor {quoted(name)} is not supported",
        hint="an adapter holds lora_A.weight and lora_B.weight of linear layers, nothing else",
    )
