"""`ovms-lora check`: whether a model folder, an adapter folder or a config.json can be served.

Does what the server does at start, short of compiling: what passes here is served. Owns the choice of what a path is,
and the summaries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from ovms_lora.adapters.adapter import BaseLinears, inspect_adapter, load_adapter
from ovms_lora.adapters.bucket import Bucket
from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.sources import adapters_in
from ovms_lora.core.errors import ConfigError, ModelFolderError, OvmsLoraError, UsageError
from ovms_lora.engine.adapter_templates import AdapterTemplates
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.draft_folder import check_draft_vocabulary
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.model import read_generation_defaults, read_max_model_len, read_options
from ovms_lora.engine.paged_graph import IR_NAME
from ovms_lora.engine.tokenizer import Tokenizer
from ovms_lora.server.model_source import ConfigFile, ModelSpec
from ovms_lora.server.model_versions import find_version

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MAX_RANK = 256  # of any server


def check(place: Path | BucketUrl, *, base: Path | None = None) -> Iterator[str]:
    """Yield lines that sum up what is at a path, or at an adapter's address. Raises the first thing that is wrong."""
    if isinstance(place, BucketUrl):
        yield _check_far_adapter(place, base)
    else:
        yield from _check_path(place, base)


def _check_path(path: Path, base: Path | None) -> Iterator[str]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist", hint="give a model folder, an adapter folder or a config.json")
    is_adapter = path.is_dir() and (base is not None or any((path / name).exists() for name in _ADAPTER_FILES))
    if base is not None and (not is_adapter or (path / IR_NAME).exists()):
        raise UsageError("--base goes with an adapter folder", hint="ovms-lora check ADAPTER --base MODEL_FOLDER")
    if is_adapter:
        yield _check_adapter(path, base)
    elif path.is_dir():
        yield _check_model(find_version(path.absolute()).folder)[0]
    else:
        yield from _check_config(path)


def _check_config(path: Path) -> Iterator[str]:
    """Check every model of a config.json with its adapters."""
    specs = ConfigFile(path).read()
    for spec in specs:
        try:
            line, linears = _check_model(spec.folder, spec.entry.graph_path)
        except OvmsLoraError as error:
            raise ModelFolderError(f"model {spec.name!r}: {error.message}", hint=error.hint) from error
        yield f"{spec.name}: {line}"
        yield from _check_adapters(spec, linears)
        yield from _check_loading_path(spec)
    yield f"{path}: {len(specs)} models can be served"


def _check_adapters(spec: ModelSpec, linears: BaseLinears) -> Iterator[str]:
    if spec.lora is None:
        return
    for adapter in spec.lora.adapters:
        try:
            line = _loaded(adapter.folder, linears, spec.lora.options.max_lora_rank)
        except OvmsLoraError as error:
            raise ConfigError(
                f"adapter {adapter.alias!r} of {spec.name!r}: {error.message}", hint=error.hint
            ) from error
        yield f"{spec.name}:{adapter.alias}: {line}"
    for composite in spec.lora.composites:
        yield f"{spec.name}:{composite.alias}: composite of {', '.join(alias for alias, _ in composite.components)}"


def _check_loading_path(spec: ModelSpec) -> Iterator[str]:
    path = spec.lora.loading_path if spec.lora else None
    if isinstance(path, Path) and not path.is_dir():
        raise ConfigError(f"the loading path {path} of {spec.name!r} is not a folder", hint="create it")
    if path is not None:
        names = adapters_in(path) if isinstance(path, Path) else Bucket(path).names()
        yield f"{spec.name}: loading path {path}: {len(names)} adapters"


def _check_far_adapter(address: BucketUrl, base: Path | None) -> str:
    """Check an adapter of a bucket, which is downloaded for that."""
    address.check_library()
    above, name = address.split()
    bucket = Bucket(above)
    version = bucket.look(name)
    if version is None:
        raise ConfigError(
            f"there is no adapter at {address}", hint="give the address of an adapter_config.json's folder"
        )
    with tempfile.TemporaryDirectory(prefix="ovms-lora-") as folder:
        bucket.download(version, Path(folder))
        return _check_adapter(Path(folder), base)


def _check_model(folder: Path, graph_path: str | None = None) -> tuple[str, BaseLinears]:
    """Return a summary of a model folder, and its linear layers. Raises ModelFolderError."""
    inner, options = read_options(folder, graph_path)
    tokenizer = Tokenizer.from_folder(inner)
    if options.speculation and not options.speculation.looks_up:
        check_draft_vocabulary(Path(options.speculation.draft_models_path), tokenizer)
    template = ChatTemplate.from_folder(inner)
    read_generation_defaults(inner, options.generation_config_path)
    length = read_max_model_len(inner)
    linears = GraphSource(inner, options).linears
    chat = "with a chat template" if template else "without a chat template"
    return f"model of {len(linears.shapes)} linear layers and {length} positions, {chat}", linears


def _check_adapter(folder: Path, base: Path | None) -> str:
    if base is not None:
        inner, options = read_options(base)
        return f"{_loaded(folder, GraphSource(inner, options).linears, _MAX_RANK)}, fits {base}"
    summary = inspect_adapter(folder)
    return (
        f"adapter of rank {summary.max_rank} for {len(summary.ranks)} linear layers, {', '.join(summary.dtypes)}, "
        f"{summary.nbytes / 1e6:.1f} MB; --base MODEL_FOLDER checks it against a base"
    )


def _loaded(folder: Path, linears: BaseLinears, max_rank: int) -> str:
    adapter = load_adapter(folder, linears, max_lora_rank=max_rank, lora_dtype="float32")
    chat = ", with a chat template of its own" if AdapterTemplates().of(adapter) else ""
    return (
        f"adapter of rank {adapter.max_rank} for {len(adapter.layers)} linear layers, "
        f"digest {adapter.digest[:12]}{chat}"
    )
