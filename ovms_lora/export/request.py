"""What one export is asked to do: the command line as typed values, and the parts that it names.

Knows nothing of files: whether a source exists or an adapter fits is seen by source.py, peft_folder.py and plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ovms_lora.core.config import CompositeEntry, EngineOptions
from ovms_lora.export.compression import Compression
from ovms_lora.export.weight_format import WeightFormat


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
    """One `text_generation` export; paths are relative to the cwd.

    `model_name` None takes the source's name. `weight_format` None takes what an OpenVINO model has, else what the
    device takes; `compression` None what goes with the device.
    `draft_source` is a smaller model to guess ahead with, put beside the model under `draft_name` (None: its source's).
    `max_drift` is the largest mean KL divergence that `verify` lets pass, in nats; None lets any pass.
    """

    source_model: str
    repository: Path = Path("models")
    model_name: str | None = None
    config_file: Path = Path("config.json")
    weight_format: WeightFormat | None = None
    compression: Compression | None = None
    adapters: tuple[MergeSource, ...] = ()
    tokenizer: str | None = None
    loras: SourceLoras = field(default_factory=SourceLoras)
    engine: EngineOptions = field(default_factory=EngineOptions)
    overwrite: bool = False
    trust_remote_code: bool = False
    verify: bool = False
    max_drift: float | None = None
    draft_source: str | None = None
    draft_name: str | None = None
