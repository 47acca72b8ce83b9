"""Typed configuration: config.json (contract section 2) and the options of one engine.

Owns the shape of config.json and its reading; knows nothing of what the folders hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ovms_lora.core.config_fault import fault_of
from ovms_lora.core.errors import ConfigError
from ovms_lora.core.names import check_alias, check_model_name
from ovms_lora.core.ovms_keys import OvmsKeys
from ovms_lora.core.plain_file import read_text
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.core.strength import MAX_STRENGTH
from ovms_lora.core.strict_model import LocalPath, StrictModel, checked, refusal, unique_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How one engine runs: OVMS's LLMCalculatorOptions, with its names and defaults.

    `cache_size` is the KV cache in GB; 0 sizes it from free memory. `max_tokens_limit` None is the model's length.
    `generation_config_path` is absolute or relative to the model's folder; empty is the file in that folder.
    `speculation` None guesses no tokens.
    """

    device: str = "CPU"
    plugin_config: dict[str, Any] = field(default_factory=dict)
    cache_size: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 256
    dynamic_split_fuse: bool = True
    enable_prefix_caching: bool = True
    best_of_limit: int = 20
    max_tokens_limit: int | None = None
    tool_parser: str = ""
    reasoning_parser: str = ""
    enable_tool_guided_generation: bool = False
    generation_config_path: str = ""
    speculation: SpeculationOptions | None = None


Alias = Annotated[str, checked(check_alias)]
ModelName = Annotated[str, checked(check_model_name)]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)]


class LoraAdapterEntry(StrictModel):
    """One runtime adapter: `alpha` multiplies the adapter's own PEFT scaling."""

    alias: Alias
    path: LocalPath
    alpha: Strength = 1.0


class CompositeComponent(StrictModel):
    """One part of a weighted sum of adapters; `alpha` None takes the adapter's configured alpha."""

    adapter_alias: Alias
    alpha: Strength | None = None


class CompositeEntry(StrictModel):
    """An alias for a weighted sum of adapters."""

    alias: Alias
    components: Annotated[list[CompositeComponent], Field(min_length=1)]


class LoraOptions(StrictModel):
    """How many adapters a base model holds, and where more come from.

    `dynamic_lora_loading_path` is a folder, or a bucket's address. Adapters from a bucket are kept in
    `adapter_cache_path`, at most `adapter_cache_size` GB.

    `linears` says which layers can take an adapter without another compilation: those that a registered one targets, or
    all. An adapter for other layers is taken in both cases.
    """

    max_loras: Annotated[int, Field(ge=1)] = 8
    max_lora_rank: Annotated[int, Field(ge=1, le=256)] = 64
    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    total_rank: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    lora_dtype: Literal["auto", "f32", "bf16"] = "auto"
    linears: Literal["registered", "all"] = "registered"
    dynamic_lora_loading_path: str | None = None
    adapter_cache_path: LocalPath | None = None
    adapter_cache_size: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 10.0
    pinned: list[Alias] = Field(default_factory=list)


class ModelEntry(OvmsKeys):
    """One model of config.json; without the last three keys it is a plain OVMS entry."""

    name: ModelName
    base_path: LocalPath
    lora_adapters: list[LoraAdapterEntry] = Field(default_factory=list)
    composite_lora_adapters: list[CompositeEntry] = Field(default_factory=list)
    lora_options: LoraOptions | None = None

    @property
    def takes_adapters(self) -> bool:
        """Whether this model is served with runtime adapters."""
        return bool(self.lora_adapters or self.composite_lora_adapters or self.lora_options)

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield the place and the text of each name that the entry takes."""
        yield "name", self.name
        for at, adapter in enumerate(self.lora_adapters):
            yield f"lora_adapters.{at}.alias", adapter.alias
        for at, composite in enumerate(self.composite_lora_adapters):
            yield f"composite_lora_adapters.{at}.alias", composite.alias

    @model_validator(mode="after")
    def _names_fit(self) -> ModelEntry:
        adapters = [entry.alias for entry in self.lora_adapters]
        hint = "name an alias of lora_adapters of the same model"
        for at, entry in enumerate(self.composite_lora_adapters):
            for part, component in enumerate(entry.components):
                if component.adapter_alias not in adapters:
                    raise refusal(
                        f"composite {entry.alias!r} names unknown adapter {component.adapter_alias!r}",
                        hint=hint,
                        at=f"composite_lora_adapters.{at}.components.{part}.adapter_alias",
                    )
        for at, alias in enumerate(self.lora_options.pinned if self.lora_options else ()):
            if alias not in adapters:
                raise refusal(
                    f"lora_options.pinned names unknown adapter {alias!r}", hint=hint, at=f"lora_options.pinned.{at}"
                )
        _refuse_twice(self.names())
        return self


class _GraphEntry(ModelEntry):
    """An entry of the list of graphs, whose folder is by default named as the graph."""

    base_path: LocalPath = ""

    @model_validator(mode="before")
    @classmethod
    def _folder_of_its_name(cls, value: Any) -> Any:
        return {"base_path": value["name"], **value} if isinstance(value, dict) and "name" in value else value


class _Wrapped(StrictModel):
    config: ModelEntry


class _Metrics(StrictModel):
    enable: bool | None = None
    metrics_list: list[str] = Field(default_factory=list)


class _Monitoring(StrictModel):
    metrics: _Metrics = _Metrics()


class ServerConfig(StrictModel):
    """The whole of config.json.

    `mediapipe_config_list` is OVMS's older list, of the same entries without `config`. `monitoring` is read at start;
    its `metrics_list` has no effect: all metrics are given. The last three lists may only be empty.
    """

    model_config_list: list[_Wrapped] = Field(default_factory=list)
    mediapipe_config_list: list[_GraphEntry] = Field(default_factory=list)
    monitoring: _Monitoring = _Monitoring()
    custom_loader_config_list: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)
    pipeline_config_list: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)
    custom_node_library_config_list: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The models in the order of the file."""
        return (*(wrapped.config for wrapped in self.model_config_list), *self.mediapipe_config_list)

    @model_validator(mode="after")
    def _names_differ(self) -> ServerConfig:
        listed = [(f"model_config_list.{at}.config", item.config) for at, item in enumerate(self.model_config_list)]
        listed += [(f"mediapipe_config_list.{at}", item) for at, item in enumerate(self.mediapipe_config_list)]
        _refuse_twice((f"{place}.{key}", name) for place, entry in listed for key, name in entry.names())
        return self


def _refuse_twice(names: Iterable[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for at, name in names:
        if name in seen:
            raise refusal(f"the name {name!r} is used twice", hint="models and aliases share one set of names", at=at)
        seen.add(name)


def read_server_config(path: Path) -> ServerConfig:
    """Read config.json; paths in it stay as written (relative to the file's folder).

    Raises ConfigError with the key or the position that is wrong.
    """
    return parse_server_config(read_text(path), origin=str(path))


def parse_server_config(text: str, *, origin: str = "config.json") -> ServerConfig:
    """Parse the text of a config.json; `origin` stands in error messages. Raises ConfigError."""
    try:
        document = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ConfigError(f"{origin} is nested too deeply", hint="write it in the form of the examples") from error
    except ValueError as error:  # JSONDecodeError, a key that stands twice, a number of more digits than Python reads
        raise ConfigError(f"{origin} is not valid JSON: {error}", hint="correct the file at that place") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{origin} must hold a JSON object", hint='like {"model_config_list": []}')
    try:
        return ServerConfig.model_validate(document)
    except ValidationError as error:
        fault = fault_of(error)
        raise ConfigError(f"{origin}: {fault.place}: {fault.message}", hint=fault.hint) from error
