"""An export thought through before it begins: all that can fail early, and what is there already.

Owns: the checks that need neither torch nor long, the decision between exporting and having nothing to do.
Does not know: how anything is merged, converted or written.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ovms_lora.core.errors import ConfigError, ExportError, UsageError
from ovms_lora.core.names import check_model_name
from ovms_lora.export.config_file import Registration, check_registration
from ovms_lora.export.digests import files_digest
from ovms_lora.export.loras import FOLDER as LORAS
from ovms_lora.export.loras import RuntimeAdapter, find_runtime_adapter, rank_beyond_default
from ovms_lora.export.manifest import (
    MANIFEST_NAME,
    MergedAdapter,
    Recipe,
    SourceRecord,
    read_manifest,
)
from ovms_lora.export.peft_folder import PeftFolder, check_fits, find_adapter
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.request import ExportRequest
from ovms_lora.export.source import Source, SourceKind, content_files, find_model, find_tokenizer, tensor_shapes

_OVERWRITE: Final = "--overwrite_models replaces it; --model_name exports beside it"


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked export."""

    request: ExportRequest
    name: str
    source: Source
    adapters: tuple[PeftFolder, ...]
    loras: tuple[RuntimeAdapter, ...]
    tokenizer: Path | None
    recipe: Recipe

    @property
    def target(self) -> Path:
        """Where the model folder goes."""
        return self.request.repository / self.name

    @property
    def registration(self) -> Registration:
        """What config.json gets."""
        return _registration(self.request, self.name, self.loras)


def make_plan(request: ExportRequest, progress: ExportProgress) -> Plan:
    """Find and check all that the request names. Raises UsageError, ConfigError or ExportError."""
    if request.tokenizer is not None and len(request.adapters) != 1:
        raise UsageError("--tokenizer goes with exactly one --adapter", hint="give the adapter that it belongs to")
    with progress.step("find", _sources(request)), progress.silence():
        source = find_model(request.source_model, trust_remote_code=request.trust_remote_code)
        name = _name(request, source)
        _check_place(request.repository, name)
        check_registration(request.config_file, _registration(request, name, ()))
        loras = tuple(
            find_runtime_adapter(lora, request.repository, overwrite=request.overwrite)
            for lora in request.loras.adapters
        )
        check_registration(request.config_file, _registration(request, name, loras))
        tokenizer = find_tokenizer(request.tokenizer) if request.tokenizer else None
        adapters = tuple(find_adapter(item.source, item.weight) for item in request.adapters)
        if source.kind is SourceKind.FOLDER:
            shapes = tensor_shapes(source.weight_files)
            for adapter in adapters:
                check_fits(adapter, shapes, resized=tokenizer is not None)
    recipe = _recipe(request, source, adapters, tokenizer, progress)
    return Plan(request, name, source, adapters, loras, tokenizer, recipe)


def nothing_to_do(plan: Plan) -> bool:
    """Return whether the model is there already as requested; False means that it is to be exported.

    Raises ExportError if something else is in its place and may not be replaced. The model's lock must be held.
    """
    target, overwrite = plan.target, plan.request.overwrite
    if not target.exists():
        return False
    if not target.is_dir():
        raise ExportError(f"{target} is not a folder", hint="move it away, or choose another --model_name")
    if not (target / MANIFEST_NAME).is_file() and not (overwrite and _is_model(target)):
        hint = "--overwrite_models replaces it" if _is_model(target) else "choose another --model_name"
        raise ExportError(f"{target} exists and was not written by this exporter", hint=hint)
    if overwrite:
        _refuse_nest(target)
        return False
    manifest = read_manifest(target)
    assert manifest is not None
    if different := manifest.recipe.differences(plan.recipe):
        raise ExportError(f"{target} holds a different export ({'; '.join(different)})", hint=_OVERWRITE)
    if damage := manifest.damage(target):
        raise ExportError(f"{target} is damaged: {damage}", hint="--overwrite_models exports it again")
    return True


def check_space(plan: Plan) -> None:
    """Raise ExportError if the repository's disk has less room than the export takes at its peak."""
    needed = _space_needed(plan)
    free = shutil.disk_usage(plan.request.repository).free
    if free < needed:
        raise ExportError(
            f"the export needs about {needed / 1e9:.1f} GB in {plan.request.repository}, {free / 1e9:.1f} GB are free",
            hint="free some space, or choose another --model_repository_path",
        )


def _space_needed(plan: Plan) -> int:
    """Bytes: the IR before compression, the IR after it, and for GGUF the Hugging Face folder made of it."""
    stored = plan.source.size
    if plan.source.kind is SourceKind.GGUF:
        full = stored * 7  # 4 bytes for what 4-bit blocks hold in 0.56; larger blocks need less
        return full * 2 + stored
    # 16-bit weights stay so on their way unless adapters are merged.
    factor = 2 if plan.adapters or plan.request.weight_format == "fp32" else 1
    return stored * factor + (stored if plan.request.weight_format.compressed else 0)


def _sources(request: ExportRequest) -> str:
    merged = [adapter.source for adapter in request.adapters]
    beside = [adapter.source for adapter in request.loras.adapters]
    return ", ".join([request.source_model, *merged, *beside])


def _registration(request: ExportRequest, name: str, loras: tuple[RuntimeAdapter, ...]) -> Registration:
    return Registration(
        name,
        request.repository / name,
        adapters=tuple((lora.alias, request.repository / lora.place, lora.alpha) for lora in loras),
        composites=request.loras.composites if loras else (),
        max_lora_rank=rank_beyond_default(loras),
    )


def _name(request: ExportRequest, source: Source) -> str:
    try:
        name = check_model_name(request.model_name or source.default_name)
    except ConfigError as error:
        raise UsageError(error.message, hint=f"choose another with --model_name; {error.hint}") from error
    if name.split("/")[0] == LORAS:
        raise UsageError(f"model name {name!r}: {LORAS}/ of a repository holds its runtime adapters")
    return name


def _check_place(repository: Path, name: str) -> None:
    """Refuse a repository that is a file, and a model inside another model's folder."""
    if repository.exists() and not repository.is_dir():
        raise ExportError(f"{repository} is not a folder", hint="choose another --model_repository_path")
    for parent in (repository / name).parents:
        if parent == repository:
            break
        if (parent / MANIFEST_NAME).exists() or (parent / "openvino_model.xml").exists():
            raise ExportError(f"{repository / name} would be inside the model {parent}", hint="choose another name")


def _is_model(folder: Path) -> bool:
    """Whether the folder holds a model of someone's, or nothing: all that overwriting a model may remove."""
    return (folder / "openvino_model.xml").is_file() or (folder / "graph.pbtxt").is_file() or not any(folder.iterdir())


def _refuse_nest(target: Path) -> None:
    """Refuse to overwrite `org` where `org/name` is a model: replacing the one would remove the other."""
    nested = next((path.parent for path in target.rglob(MANIFEST_NAME) if path.parent != target), None)
    if nested:
        raise ExportError(f"{target} holds the model {nested}, which would be lost", hint="choose another --model_name")


def _recipe(
    request: ExportRequest,
    source: Source,
    adapters: tuple[PeftFolder, ...],
    tokenizer: Path | None,
    progress: ExportProgress,
) -> Recipe:
    with progress.step("hash", request.source_model, total=source.size) as step:
        record = SourceRecord(source=source.given, digest=source.digest(step.advance))
    return Recipe(
        source=record,
        weight_format=request.weight_format,
        adapters=tuple(MergedAdapter(source=a.given, digest=a.digest, weight=a.weight) for a in adapters),
        tokenizer=_tokenizer_record(request, tokenizer),
        engine=asdict(request.engine),
    )


def _tokenizer_record(request: ExportRequest, folder: Path | None) -> SourceRecord | None:
    if folder is None or request.tokenizer is None:
        return None
    return SourceRecord(source=request.tokenizer, digest=files_digest(content_files(folder), folder))
