"""The keys of an OVMS model entry that OVMS itself has: which of them mean something for a language model.

Most of them configure models with fixed inputs. Those that change no answer of a language model are accepted, so that
an existing file is served as it is; those that would change one are refused.

| key | here |
|---|---|
| `base_path`, `graph_path` | honoured: where graph.pbtxt is |
| `target_device`, `plugin_config` | honoured: laid over graph.pbtxt |
| `model_version_policy` | honoured: which version folder is served; requests name no version, so it is one |
| `nireq`, `batch_size`, `max_sequence_number`, `idle_sequence_cleanup` | no effect: requests are batched continuously |
| `graph_queue_max_size`, `allow_cache`, `subconfig` | no effect: no graph is pooled, cached or completed |
| `shape: "auto"`, `stateful: false`, `low_latency_transformation: false` | no effect: they ask for nothing |
| other values of these, `layout`, `custom_loader_options` | refused: they would change the model |
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from ovms_lora.core.strict_model import LocalPath, StrictModel, refusal

_UNUSED: Final = (
    *("nireq", "batch_size", "max_sequence_number", "idle_sequence_cleanup", "graph_queue_max_size"),
    *("allow_cache", "subconfig", "shape", "stateful", "low_latency_transformation"),
)


def _object(value: Any) -> Any:
    """Accept an object that is written as a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise refusal("the string is not JSON", hint='like {"INFERENCE_PRECISION_HINT": "f32"}') from error


def _refuse_shape(value: Any) -> Any:
    if value != "auto":
        raise refusal("a fixed shape does not fit a language model", hint='remove it, or write "auto"')
    return value


def _refuse_true(value: Any) -> Any:
    if value is not False:
        raise refusal("it would transform the model", hint="remove it: the model keeps its state in a paged cache")
    return value


def _refuse(_: Any) -> Any:
    raise refusal("it has no meaning for a language model", hint="remove it")


Count = Annotated[int, Field(ge=0)]
Off = Annotated[bool | None, BeforeValidator(_refuse_true)]
PluginConfig = Annotated[dict[str, Any], BeforeValidator(_object)]


class _Latest(StrictModel):
    num_versions: Annotated[int, Field(ge=1)] = 1


class _Specific(StrictModel):
    versions: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class _All(StrictModel):
    pass


class VersionPolicy(StrictModel):
    """Which version folders OVMS would serve; the one that answers requests without a version is the highest."""

    latest: _Latest | None = None
    specific: _Specific | None = None
    all: _All | None = None

    @property
    def versions(self) -> tuple[int, ...] | None:
        """The versions that may be served; None is any."""
        return tuple(self.specific.versions) if self.specific else None


class OvmsKeys(StrictModel):
    """What an entry may hold beside its name, its path and its adapters."""

    graph_path: LocalPath | None = None
    target_device: str | None = None
    plugin_config: PluginConfig = Field(default_factory=dict)
    model_version_policy: Annotated[VersionPolicy | None, BeforeValidator(_object)] = None
    nireq: Count | None = None
    batch_size: Count | str | None = None
    max_sequence_number: Count | None = None
    idle_sequence_cleanup: bool | None = None
    graph_queue_max_size: int | Literal["AUTO"] | None = None
    allow_cache: bool | None = None
    subconfig: LocalPath | None = None
    shape: Annotated[str | None, BeforeValidator(_refuse_shape)] = None
    stateful: Off = None
    low_latency_transformation: Off = None
    layout: Annotated[None, BeforeValidator(_refuse)] = None
    custom_loader_options: Annotated[None, BeforeValidator(_refuse)] = None

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The keys that are given and change nothing."""
        return tuple(key for key in _UNUSED if getattr(self, key) is not None)
