"""What is wanted and shown of one base's runtime adapters: plain values, no files read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ovms_lora.adapters.sources import LoadingPath
from ovms_lora.core.config import LoraOptions


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter as it is wanted: `alpha` multiplies its own PEFT scaling; a pinned one stays resident."""

    alias: str
    folder: Path
    alpha: float = 1.0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class CompositeSpec:
    """A weighted sum of adapters under one alias; a strength of None is the adapter's own `alpha`."""

    alias: str
    components: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """All that config.json or the command line says of one base's runtime adapters.

    `cache_folder` is where adapters from buckets are kept; None is the user's.
    """

    options: LoraOptions = field(default_factory=LoraOptions)
    adapters: tuple[AdapterSpec, ...] = ()
    composites: tuple[CompositeSpec, ...] = ()
    loading_path: LoadingPath | None = None
    cache_folder: Path | None = None

    @property
    def cache_bytes(self) -> int:
        """How much of adapters from buckets is kept in `cache_folder`."""
        return int(self.options.adapter_cache_size * 1e9)

    def finds_as(self, other: LoraConfig) -> bool:
        """Whether adapters that nobody has configured come from where they come in `other`."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("loading_path", "cache_folder", "cache_bytes")
        )


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What is shown of an adapter or, with `components`, of a composite."""

    alias: str
    root: str
    digest: str = ""
    rank: int = 0
    pinned: bool = False
    resident: bool = False
    components: tuple[str, ...] = ()
