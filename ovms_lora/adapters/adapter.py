"""An adapter: a PEFT LoRA folder, checked against a base model and read into host memory.

Owns the order of the checks: configuration, header, names, ranks and shapes against the base, completeness; these need
the header alone, so nothing is allocated for an adapter that they refuse. Then the values. Fails closed: an adapter is
loaded as PEFT would apply it, or refused with the field or tensor named. Knows nothing of graphs, devices or aliases.

Which code for a wrong width: BASE_MISMATCH when *no* module fits (and there are at least two), as with an adapter for
another base; SHAPE when some do, as with a broken file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ovms_lora.adapters.adapter_folder import AdapterFile, AdapterFolder, open_adapter_folder
from ovms_lora.adapters.peft_config import CONFIG_NAME, PeftConfig, read_peft_config
from ovms_lora.adapters.quoting import quoted
from ovms_lora.adapters.safetensors_file import (
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    SafetensorsFile,
    TensorInfo,
    open_safetensors,
)
from ovms_lora.adapters.targets import ModuleScale, Targets
from ovms_lora.adapters.template_files import read_template_files
from ovms_lora.adapters.tensor_names import NamedTensors, TensorPair, pair_tensors
from ovms_lora.core.chat_template import TemplateSource
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

# Rows of a batch share one product with the A, and one with the scaled B, of all residents; zero times infinity is no
# zero, so an adapter that makes these overflow would spoil the rows of others. Below this the sums stay in float32.
_LARGEST = 1e15


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The size of one linear layer; its weight is [out_features, in_features]."""

    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class BaseLinears:
    """The linear layers of a base model that can take a LoRA, by PyTorch module path.

    For example `model.layers.0.self_attn.q_proj`. `output_head` is the path that "all-linear" leaves out, None if the
    base has none.
    """

    shapes: Mapping[str, LinearShape]
    output_head: str | None = "lm_head"


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """One module's LoRA: the layer's output gains scaling · B(A x). A is [r, in], B is [out, r], both read-only.

    Both lie in memory by columns, as the states of a graph have them: there they are copied while others wait.
    """

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """A checked adapter. `digest` is the SHA-256 (hex) of its content, and with it its identity.

    `layers` is keyed by the base's module paths. `frozen_copies` names tensors that PEFT saved beside the LoRA as
    copies of untouched base weights; they have the base's shape and are not read. `chat_template` is its own, if any;
    `max_rank` is the largest rank of any module.
    """

    digest: str
    config: PeftConfig
    layers: Mapping[str, LoraPair]
    dtype: np.dtype[Any]
    frozen_copies: tuple[str, ...] = ()
    chat_template: TemplateSource | None = None
    # Counted once: the scheduler asks for it in every step, of every adapter that waits and that is resident.
    max_rank: int = field(init=False)

    def __post_init__(self) -> None:
        """Find the largest rank."""
        object.__setattr__(self, "max_rank", max(pair.rank for pair in self.layers.values()))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {module: pair.rank for module, pair in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the tensors take."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.layers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """What can be said of an adapter without a base and without reading its tensors."""

    config: PeftConfig
    ranks: Mapping[str, int]
    dtypes: tuple[str, ...]
    nbytes: int

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())


@dataclass(frozen=True, slots=True)
class _OpenAdapter:
    """Configuration and header of an adapter whose files are open."""

    config: PeftConfig
    config_bytes: bytes
    files: tuple[AdapterFile, ...]
    weights: SafetensorsFile
    chat_template: TemplateSource | None


def load_adapter(folder: Path, base: BaseLinears, *, max_lora_rank: int, lora_dtype: npt.DTypeLike) -> Adapter:
    """Read the adapter in `folder`, check it against `base`, and hold its tensors as `lora_dtype` (f32, f16 or bf16).

    Raises AdapterNotFoundError (no such folder) and AdapterError (bad in itself, or not for this base).
    """
    dtype = np.dtype(lora_dtype)
    with open_adapter_folder(folder) as opened:
        source = _open(opened)
        tensors = pair_tensors(source.weights.tensors, base.shapes)
        _check_not_empty(tensors)
        targets = Targets(source.config, output_head=base.output_head)
        scales = {pair.module: targets.scale(pair.module) for pair in tensors.pairs}
        _check_ranks_allowed(scales, max_lora_rank)
        _check_widths(tensors, base)
        _check_ranks(tensors, scales)
        _check_targets(tensors, targets, base)
        arrays, digest = _read_tensors(source, tensors, dtype)
        for file in source.files:
            file.check_unchanged()
    layers = {
        pair.module: LoraPair(arrays[pair.a.name], arrays[pair.b.name], scales[pair.module].scaling)
        for pair in tensors.pairs
    }
    _check_scaled(tensors, layers)
    frozen = tuple(info.name for info in tensors.frozen.values())
    return Adapter(digest, source.config, MappingProxyType(layers), dtype, frozen, source.chat_template)


def inspect_adapter(folder: Path) -> AdapterSummary:
    """Read configuration and header only. Raises like `load_adapter`, for what can be seen without base and values."""
    with open_adapter_folder(folder) as opened:
        source = _open(opened)
        tensors = pair_tensors(source.weights.tensors, None)
        _check_not_empty(tensors)
        targets = Targets(source.config, output_head=None)
        _check_ranks(tensors, {pair.module: targets.scale(pair.module) for pair in tensors.pairs})
    infos = [info for pair in tensors.pairs for info in (pair.a, pair.b)]
    return AdapterSummary(
        config=source.config,
        ranks={pair.module: pair.a.shape[0] for pair in tensors.pairs},
        dtypes=tuple(sorted({info.dtype.name for info in infos})),
        nbytes=sum(info.nbytes for info in infos),
    )


def _open(folder: AdapterFolder) -> _OpenAdapter:
    config_file = folder.open(
        CONFIG_NAME, missing=AdapterErrorCode.CONFIG_MISSING, unusable=AdapterErrorCode.CONFIG_INVALID
    )
    config, config_bytes = read_peft_config(config_file)
    try:
        weights_file = folder.open(WEIGHTS_NAME, missing=AdapterErrorCode.INCOMPLETE, unusable=AdapterErrorCode.FORMAT)
    except AdapterError as error:
        pickle = folder.first_with_suffix(PICKLE_SUFFIXES)
        if error.code is not AdapterErrorCode.INCOMPLETE or pickle is None:
            raise
        raise AdapterError(
            AdapterErrorCode.FORMAT,
            f"the adapter's weights are a pickle, {quoted(pickle)}",
            hint="save the adapter with safe_serialization=True",
        ) from error
    template = read_template_files(folder)
    files = (config_file, weights_file, *template.files)
    return _OpenAdapter(config, config_bytes, files, open_safetensors(weights_file), template.source)


def _check_not_empty(tensors: NamedTensors) -> None:
    if not tensors.pairs:
        raise AdapterError(AdapterErrorCode.INCOMPLETE, f"{WEIGHTS_NAME} holds no LoRA tensors")


def _check_ranks_allowed(scales: Mapping[str, ModuleScale], max_lora_rank: int) -> None:
    rank = max(scale.rank for scale in scales.values())
    if rank > max_lora_rank:
        raise AdapterError(
            AdapterErrorCode.RANK,
            f"LoRA rank {rank} is greater than max_lora_rank {max_lora_rank}.",
            hint="raise max_lora_rank, or train with a lower rank",
        )


def _check_widths(tensors: NamedTensors, base: BaseLinears) -> None:
    """A takes the layer's input and B gives its output, whatever the rank between them is."""
    wrong = [(pair, info) for pair in tensors.pairs if (info := _wrong_width(pair, base.shapes[pair.module]))]
    for module, info in tensors.frozen.items():
        shape = base.shapes[module]
        if info.shape != (shape.out_features, shape.in_features):
            raise AdapterError(
                AdapterErrorCode.BASE_MISMATCH,
                f"tensor {quoted(info.name)} has shape {list(info.shape)}, the base's layer is "
                f"[{shape.out_features}, {shape.in_features}]",
                hint="the adapter was trained on a base with another vocabulary",
            )
    if not wrong:
        return
    pair, info = wrong[0]
    shape = base.shapes[pair.module]
    want = f"[r, {shape.in_features}]" if info is pair.a else f"[{shape.out_features}, r]"
    message = f"tensor {quoted(info.name)} has shape {list(info.shape)}, the base's layer wants {want}"
    if len(wrong) == len(tensors.pairs) > 1:
        raise AdapterError(AdapterErrorCode.BASE_MISMATCH, message, hint="the adapter was trained on another base")
    raise AdapterError(AdapterErrorCode.SHAPE, message)


def _wrong_width(pair: TensorPair, shape: LinearShape) -> TensorInfo | None:
    if len(pair.a.shape) != 2 or pair.a.shape[1] != shape.in_features:
        return pair.a
    if len(pair.b.shape) != 2 or pair.b.shape[0] != shape.out_features:
        return pair.b
    return None


def _check_ranks(tensors: NamedTensors, scales: Mapping[str, ModuleScale]) -> None:
    for pair in tensors.pairs:
        rank = scales[pair.module].rank
        for info, axis in ((pair.a, 0), (pair.b, 1)):
            if len(info.shape) != 2:
                raise AdapterError(AdapterErrorCode.SHAPE, f"tensor {quoted(info.name)} has not two dimensions")
            if info.shape[axis] != rank:
                raise AdapterError(
                    AdapterErrorCode.RANK,
                    f"tensor {quoted(info.name)} has rank {info.shape[axis]}, {CONFIG_NAME} gives its module {rank}",
                )


def _check_targets(tensors: NamedTensors, targets: Targets, base: BaseLinears) -> None:
    """The configuration and the tensors name the same modules: PEFT would drop or leave untrained what differs."""
    present = {pair.module: pair.a for pair in tensors.pairs}
    for module in base.shapes:
        targeted = targets.include(module)
        if targeted and module not in present:
            raise AdapterError(
                AdapterErrorCode.INCOMPLETE, f"target_modules means {module}, but there are no tensors for it"
            )
        if not targeted and module in present:
            raise AdapterError(
                AdapterErrorCode.MODULE,
                f"tensor {quoted(present[module].name)} is for a module that {CONFIG_NAME} does not target",
            )


def _read_tensors(
    source: _OpenAdapter, tensors: NamedTensors, dtype: np.dtype[Any]
) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """Read the tensors in the order of the file, one at a time; return them and the digest of all that was read."""
    used = {info.name for pair in tensors.pairs for info in (pair.a, pair.b)}
    digest = hashlib.sha256()
    template = () if source.chat_template is None else (repr(source.chat_template).encode(errors="backslashreplace"),)
    for part in (source.config_bytes, source.weights.header, *template):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for info in source.weights.tensors:
        if info.name in used:
            array = source.weights.read(info)
            digest.update(array.reshape(-1).view(np.uint8).data)
            arrays[info.name] = _converted(info, array, dtype)
    return arrays, digest.hexdigest()


def _converted(info: TensorInfo, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with np.errstate(all="ignore"):  # what is no number, or overflows, is refused below, by name
        return _checked(info, array, array.astype(dtype, order="F", copy=False))


def _checked(info: TensorInfo, array: npt.NDArray[Any], converted: npt.NDArray[Any]) -> npt.NDArray[Any]:
    dtype = converted.dtype
    # NaN and infinity show in the extremes, which numpy finds far faster in float32 than in the narrower types.
    if not _magnitude(converted if dtype == np.float32 else array) <= _LARGEST:
        overflows = f"values above {_LARGEST:g}: sums overflow"
        what = overflows if np.isfinite(array).all() else "NaN or infinity"
        raise AdapterError(AdapterErrorCode.NONFINITE, f"tensor {quoted(info.name)} holds {what}")
    if dtype != np.float32 and not np.isfinite(converted).all():
        raise AdapterError(
            AdapterErrorCode.NONFINITE, f"tensor {quoted(info.name)} holds values too large for {dtype.name}"
        )
    converted.flags.writeable = False
    return converted


def _magnitude(array: npt.NDArray[Any]) -> float:
    return max(float(array.max()), -float(array.min()))


def _check_scaled(tensors: NamedTensors, layers: Mapping[str, LoraPair]) -> None:
    """B is applied with its scaling, which must not make it overflow either."""
    for named in tensors.pairs:
        pair = layers[named.module]
        if _magnitude(pair.b) * abs(pair.scaling) > _LARGEST:
            raise AdapterError(
                AdapterErrorCode.NONFINITE,
                f"tensor {quoted(named.b.name)} times its scaling {pair.scaling:g} exceeds {_LARGEST:g}: sums overflow",
            )
