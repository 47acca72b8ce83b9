"""Which models are to be served, with which adapters: from config.json, or from `--model_path`.

Owns the wanted state as a list of ModelSpec, comparable from one reading to the next. Loads nothing.

What a change of an entry means for a model that is served:

| changed | done |
|---|---|
| adapters, composites, `pinned`, loading path and cache, an adapter's files | the runtime applies it, the base stays |
| the other keys of `lora_options`; first or last of the LoRA keys | reloaded |
| the folder, its version, its files, its device and properties, how it guesses | reloaded |
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from ovms_lora.adapters.sources import LoadingPath, loading_path
from ovms_lora.core.config import LoraOptions, ModelEntry, read_server_config
from ovms_lora.core.config_fault import fault_of
from ovms_lora.core.errors import ConfigError
from ovms_lora.core.names import check_alias
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.lora_config import AdapterSpec, CompositeSpec, LoraConfig
from ovms_lora.server.model_versions import find_version

# A re-export replaces these; their identity tells that the same path holds another model.
_TELLING_FILES = ("openvino_model.xml", "openvino_model.bin", "ovms_lora_manifest.json")
_ADAPTER_FILES = (
    *("adapter_config.json", "adapter_model.safetensors"),
    *("chat_template.jinja", "tokenizer_config.json"),
)

_CLOCK_TICK_NS = 20_000_000

FileIdentity = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve. Two specs are equal when serving one is serving the other."""

    entry: ModelEntry
    folder: Path
    files: tuple[FileIdentity | None, ...]
    plugin_config: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None
    adapter_files: tuple[FileIdentity | None, ...] = ()
    version: int = 1
    speculation: SpeculationOptions | None = None

    @property
    def name(self) -> str:
        """The name to serve it under."""
        return self.entry.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """The configured names of its adapters and composites."""
        if self.lora is None:
            return ()
        return (*(a.alias for a in self.lora.adapters), *(c.alias for c in self.lora.composites))

    @property
    def load_arguments(self) -> dict[str, Any]:
        """What `load_model` is called with to serve it, apart from what the server decides."""
        return {
            "folder": self.folder,
            "graph_path": self.entry.graph_path,
            "device": self.entry.target_device,
            "plugin_config": dict(self.plugin_config),
            "overrides": {"speculation": self.speculation} if self.speculation else {},
            "lora": self.lora,
        }

    def same_base(self, other: ModelSpec) -> bool:
        """Whether a model that serves `other` can serve this by another LoraConfig alone."""
        return self._base() == other._base()

    def _base(self) -> tuple[Any, ...]:
        live = ("pinned", "dynamic_lora_loading_path", "adapter_cache_path", "adapter_cache_size")
        options = self.lora.options.model_dump(exclude=set(live)) if self.lora else None
        device, graph_path = self.entry.target_device, self.entry.graph_path
        return self.folder, self.files, device, graph_path, self.plugin_config, options, self.speculation


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter that the command line names; `base` None is the one model that takes adapters."""

    alias: str
    folder: Path
    base: str | None = None


@dataclass(frozen=True, slots=True)
class LoraDefaults:
    """What the command line says of runtime adapters.

    `enable` lets every model take adapters. `options` are keys of LoraOptions that config.json may override.
    """

    enable: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    loading_path: LoadingPath | None = None
    modules: tuple[LoraModule, ...] = ()


class ModelSource(Protocol):
    """Where the wanted models stand."""

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the models to serve. Raises ConfigError."""

    def changed(self) -> bool:
        """Tell whether `read` may return something else than the last time."""


class ReadAlready:
    """A source that has been read: the next reading gives what that gave."""

    def __init__(self, source: ModelSource, specs: tuple[ModelSpec, ...]) -> None:
        self._source = source
        self._specs: tuple[ModelSpec, ...] | None = specs

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the models to serve. Raises ConfigError."""
        specs, self._specs = self._specs, None
        return self._source.read() if specs is None else specs

    def changed(self) -> bool:
        """Tell whether `read` may return something else than the last time."""
        return self._source.changed()


class ConfigFile:
    """The models of a config.json; paths in it are relative to its folder."""

    def __init__(self, path: Path, lora: LoraDefaults | None = None) -> None:
        self._path = path
        self._lora = lora or LoraDefaults()
        self._seen: FileIdentity | None = None
        self._may_have_changed = False

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the models to serve. Raises ConfigError."""
        self._seen = file_identity(self._path)
        # Within the same tick of the file system's clock the file may be written again and look the same.
        self._may_have_changed = self._seen is not None and 0 <= time.time_ns() - self._seen[1] < _CLOCK_TICK_NS
        config = read_server_config(self._path)
        try:
            return _specs(config.models, self._path.parent, self._lora)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error.message}", hint=error.hint) from error

    def changed(self) -> bool:
        """Tell whether the file is, or may be, another one than was read last."""
        return self._may_have_changed or file_identity(self._path) != self._seen


class SingleModel:
    """The one model of `--model_path`."""

    def __init__(
        self,
        name: str,
        folder: Path,
        plugin_config: Mapping[str, Any],
        lora: LoraDefaults | None = None,
        speculation: SpeculationOptions | None = None,
    ) -> None:
        self._entry = _entry(name, folder)
        self._speculation = speculation
        self._plugin_config = plugin_config
        self._lora = lora or LoraDefaults()

    def read(self) -> tuple[ModelSpec, ...]:
        """Return the one model. Raises ConfigError."""
        (spec,) = _specs((self._entry,), Path(), self._lora, self._plugin_config)
        return (replace(spec, speculation=self._speculation),)

    def changed(self) -> bool:
        """Nothing is polled: a re-export is taken up by a reload."""
        return False


def _entry(name: str, folder: Path) -> ModelEntry:
    try:
        return ModelEntry(name=name, base_path=str(folder))
    except ValidationError as error:
        fault = fault_of(error)
        raise ConfigError(fault.message, hint=fault.hint) from error


def _specs(
    entries: Iterable[ModelEntry], root: Path, defaults: LoraDefaults, plugin_config: Mapping[str, Any] | None = None
) -> tuple[ModelSpec, ...]:
    entries = tuple(entries)
    modules = _modules_by_model(entries, defaults)
    specs = tuple(model_spec(entry, root, defaults, modules[entry.name], plugin_config) for entry in entries)
    _check_names_differ(specs)
    return specs


def model_spec(
    entry: ModelEntry,
    root: Path,
    defaults: LoraDefaults,
    modules: Iterable[LoraModule] = (),
    plugin_config: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Return the spec of one entry, whose paths are relative to `root`. Raises ConfigError."""
    policy = entry.model_version_policy
    place = find_version((root / entry.base_path).absolute(), policy.versions if policy else None)
    lora = _lora_config(entry, root, defaults, tuple(modules))
    adapters = [spec.folder for spec in lora.adapters] if lora else []
    return ModelSpec(
        entry,
        place.folder,
        tuple(file_identity(place.folder / name) for name in (*_TELLING_FILES, entry.graph_path or "graph.pbtxt")),
        {**entry.plugin_config, **(plugin_config or {})},
        lora,
        tuple(file_identity(adapter / name) for adapter in adapters for name in _ADAPTER_FILES),
        place.version,
    )


def _lora_config(
    entry: ModelEntry, root: Path, defaults: LoraDefaults, modules: tuple[LoraModule, ...]
) -> LoraConfig | None:
    if not (entry.takes_adapters or defaults.enable or modules):
        return None
    given = entry.lora_options.model_dump(exclude_unset=True) if entry.lora_options else {}
    try:
        options = LoraOptions.model_validate({**defaults.options, **given})
    except ValidationError as error:
        fault = fault_of(error)
        raise ConfigError(f"lora_options of {entry.name!r}: {fault.place}: {fault.message}", hint=fault.hint) from error
    path, cache = options.dynamic_lora_loading_path, options.adapter_cache_path
    configured = [
        AdapterSpec(adapter.alias, (root / adapter.path).absolute(), adapter.alpha, adapter.alias in options.pinned)
        for adapter in entry.lora_adapters
    ]
    return LoraConfig(
        options=options,
        adapters=(*configured, *(AdapterSpec(module.alias, module.folder.absolute()) for module in modules)),
        composites=tuple(
            CompositeSpec(composite.alias, tuple((part.adapter_alias, part.alpha) for part in composite.components))
            for composite in entry.composite_lora_adapters
        ),
        loading_path=defaults.loading_path if path is None else _loading_path(path, root, entry),
        cache_folder=None if cache is None else (root / cache).absolute(),
    )


def _loading_path(path: str, root: Path, entry: ModelEntry) -> LoadingPath:
    try:
        return loading_path(path, root)
    except ConfigError as error:
        where = f"lora_options.dynamic_lora_loading_path of {entry.name!r}"
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error


def _modules_by_model(entries: tuple[ModelEntry, ...], defaults: LoraDefaults) -> dict[str, list[LoraModule]]:
    """Give the adapters of the command line to their bases."""
    modules: dict[str, list[LoraModule]] = {entry.name: [] for entry in entries}
    takers = [entry.name for entry in entries if entry.takes_adapters] or list(modules)
    for module in defaults.modules:
        check_alias(module.alias)
        base = module.base if module.base is not None or len(takers) != 1 else takers[0]
        if base is None:
            raise ConfigError(
                f"--lora-modules does not say for which model {module.alias!r} is",
                hint='write it as {"name": …, "path": …, "base_model_name": …}',
            )
        if base not in modules:
            raise ConfigError(
                f"--lora-modules names {base!r} as a base, and there is no such model",
                hint=f"the models are {', '.join(modules) or 'none'}",
            )
        modules[base].append(module)
    return modules


def _check_names_differ(specs: Iterable[ModelSpec]) -> None:
    """Raise ConfigError for a name used twice; config.json was checked, the command line's adapters were not."""
    seen: set[str] = set()
    for name in (name for spec in specs for name in (spec.name, *spec.aliases)):
        if name in seen:
            raise ConfigError(f"the name {name!r} is used twice", hint="models and aliases share one set of names")
        seen.add(name)


def file_identity(path: Path) -> FileIdentity | None:
    """Return what changes when a file is written or replaced; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)
