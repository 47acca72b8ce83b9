"""Typed configuration: config.json (contract section 2) and the options of one engine.

Owns the shape of config.json and its reading; knows nothing of what the folders hold.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ovms_lora.core.errors import ConfigError
from ovms_lora.core.names import check_alias, check_model_name
from ovms_lora.core.strength import MAX_STRENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How one engine runs: OVMS's LLMCalculatorOptions, with its names and defaults.

    `cache_size` is the KV cache in GB; 0 sizes it from free memory. `max_tokens_limit` None is the model's length.
    `generation_config_path` is absolute or relative to the model's folder; empty is the file in that folder.
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Alias = Annotated[str, AfterValidator(check_alias)]
ModelName = Annotated[str, AfterValidator(check_model_name)]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)]


class LoraAdapterEntry(_Strict):
    """One runtime adapter: `alpha` multiplies the adapter's own PEFT scaling."""

    alias: Alias
    path: str
    alpha: Strength = 1.0


class CompositeComponent(_Strict):
    """One part of a weighted sum of adapters; `alpha` None takes the adapter's configured alpha."""

    adapter_alias: Alias
    alpha: Strength | None = None


class CompositeEntry(_Strict):
    """An alias for a weighted sum of adapters."""

    alias: Alias
    components: Annotated[list[CompositeComponent], Field(min_length=1)]


class LoraOptions(_Strict):
    """How many adapters a base model holds, and where more come from."""

    max_loras: Annotated[int, Field(ge=1)] = 8
    max_lora_rank: Annotated[int, Field(ge=1, le=256)] = 64
    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    total_rank: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    lora_dtype: Literal["auto", "f32", "bf16"] = "auto"
    dynamic_lora_loading_path: str | None = None
    pinned: list[Alias] = []


class ModelEntry(_Strict):
    """One model of config.json; without the last three keys it is a plain OVMS entry."""

    name: ModelName
    base_path: str
    lora_adapters: list[LoraAdapterEntry] = []
    composite_lora_adapters: list[CompositeEntry] = []
    lora_options: LoraOptions | None = None

    @property
    def takes_adapters(self) -> bool:
        """Whether this model is served with runtime adapters."""
        return bool(self.lora_adapters or self.composite_lora_adapters or self.lora_options)

    @model_validator(mode="after")
    def _names_fit(self) -> ModelEntry:
        adapters = [entry.alias for entry in self.lora_adapters]
        composites = [entry.alias for entry in self.composite_lora_adapters]
        for entry in self.composite_lora_adapters:
            for component in entry.components:
                if component.adapter_alias not in adapters:
                    raise ConfigError(f"composite {entry.alias!r} names unknown adapter {component.adapter_alias!r}")
        for alias in self.lora_options.pinned if self.lora_options else ():
            if alias not in adapters:
                raise ConfigError(f"lora_options.pinned names unknown adapter {alias!r}")
        _refuse_twice([self.name, *adapters, *composites])
        return self


class _Wrapped(_Strict):
    config: ModelEntry


class ServerConfig(_Strict):
    """The whole of config.json. `mediapipe_config_list` is OVMS's older list, of the same entries without `config`."""

    model_config_list: list[_Wrapped] = []
    mediapipe_config_list: list[ModelEntry] = []

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The models in the order of the file."""
        return (*(wrapped.config for wrapped in self.model_config_list), *self.mediapipe_config_list)

    @model_validator(mode="after")
    def _names_differ(self) -> ServerConfig:
        names: list[str] = []
        for model in self.models:
            names += [model.name, *(a.alias for a in model.lora_adapters)]
            names += [c.alias for c in model.composite_lora_adapters]
        _refuse_twice(names)
        return self


def _refuse_twice(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"the name {name!r} is used twice", hint="models and aliases share one set of names")
        seen.add(name)


def read_server_config(path: Path) -> ServerConfig:
    """Read config.json; paths in it stay as written (relative to the file's folder).

    Raises ConfigError with the key or the position that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {_reason(error)}", hint="give --config_path an existing file"
        ) from error
    return parse_server_config(text, origin=str(path))


def parse_server_config(text: str, *, origin: str = "config.json") -> ServerConfig:
    """Parse the text of a config.json; `origin` stands in error messages. Raises ConfigError."""
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:  # JSONDecodeError, or a number of more digits than Python reads
        raise ConfigError(f"{origin} is not valid JSON: {error}", hint="correct the file at that place") from error
    except RecursionError as error:
        raise ConfigError(f"{origin} is nested too deeply") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{origin} must hold a JSON object")
    try:
        return ServerConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ConfigError(f"{origin}: {where}: {first['msg']}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"key {twice!r} stands twice in one object")
    return result


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
