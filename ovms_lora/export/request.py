"""What one export is asked to do: the command line as typed values, and the parts that it names.

Knows nothing of files: whether a source exists or an adapter fits is seen by source.py, peft_folder.py and plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from ovms_lora.core.config import CompositeEntry, EngineOptions


class WeightFormat(StrEnum):
    """How the weights are stored in the IR; int8 is asymmetric per channel, int4 what optimum takes as default."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Bits of one stored weight."""
        return {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}[self]

    @property
    def compressed(self) -> bool:
        """Whether nncf compresses the weights after conversion."""
        return self in (WeightFormat.INT8, WeightFormat.INT4)


@dataclass(frozen=True, slots=True)
class MergeSource:
    """An adapter to merge into the base: a folder or a hub id, and what its change is multiplied by."""

    source: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RuntimeSource:
    """An adapter to register beside the base, applied per request under its alias."""

    alias: str
    source: str
    alpha: float = 1.0


@dataclass(frozen=True, slots=True)
class SourceLoras:
    """What `--source_loras` names: adapters, and weighted sums of them."""

    adapters: tuple[RuntimeSource, ...] = ()
    composites: tuple[CompositeEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """One `text_generation` export. `model_name` None takes the source's name; paths are relative to the cwd."""

    source_model: str
    repository: Path = Path("models")
    model_name: str | None = None
    config_file: Path = Path("config.json")
    weight_format: WeightFormat = WeightFormat.INT8
    adapters: tuple[MergeSource, ...] = ()
    tokenizer: str | None = None
    loras: SourceLoras = field(default_factory=SourceLoras)
    engine: EngineOptions = field(default_factory=EngineOptions)
    overwrite: bool = False
    trust_remote_code: bool = False
