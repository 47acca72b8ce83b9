"""An export thought through before it begins: all that can fail early, and what is there already.

Owns: the checks that need neither torch nor long, the decision between exporting and having nothing to do.
Does not know: how anything is merged, converted or written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from ovms_lora.core.errors import ConfigError, ExportError, UsageError
from ovms_lora.core.names import check_model_name
from ovms_lora.export.compression import Compression, default_compression, default_format
from ovms_lora.export.config_file import Registration, check_registration
from ovms_lora.export.digests import file_digest, files_digest
from ovms_lora.export.draft import Draft, find_draft
from ovms_lora.export.loras import FOLDER as LORAS
from ovms_lora.export.loras import RuntimeAdapter, find_runtime_adapter, rank_beyond_default
from ovms_lora.export.manifest import (
    MANIFEST_NAME,
    Drift,
    Manifest,
    MergedAdapter,
    Recipe,
    SourceRecord,
    read_manifest,
)
from ovms_lora.export.openvino_folder import stored_format
from ovms_lora.export.peft_folder import PeftFolder, check_fits, find_adapter
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.request import ExportRequest
from ovms_lora.export.source import Source, SourceKind, content_files, find_model, find_tokenizer, tensor_shapes
from ovms_lora.export.weight_format import WeightFormat

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
    weight_format: WeightFormat
    compression: Compression
    recipe: Recipe
    draft: Draft | None = None

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
        weight_format = _weight_format(request, source)
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
        draft = find_draft(request)
        if draft:
            request = replace(request, engine=replace(request.engine, speculation=draft.speculation))
    compression = _compression(request, source)
    recipe = _recipe(request, source, weight_format, compression, adapters, tokenizer, progress)
    if draft:
        recipe = recipe.model_copy(update={"draft": SourceRecord(source=draft.source.given, digest=draft.digest)})
    return Plan(request, name, source, adapters, loras, tokenizer, weight_format, compression, recipe, draft)


def present(plan: Plan) -> Manifest | None:
    """Return the manifest if the model is there already as requested; None means that it is to be exported.

    Raises ExportError if something else is in its place and may not be replaced. The model's lock must be held.
    """
    target, overwrite = plan.target, plan.request.overwrite
    if not target.exists():
        return None
    if not target.is_dir():
        raise ExportError(f"{target} is not a folder", hint="move it away, or choose another --model_name")
    if not (target / MANIFEST_NAME).is_file() and not (overwrite and _is_model(target)):
        hint = "--overwrite_models replaces it" if _is_model(target) else "choose another --model_name"
        raise ExportError(f"{target} exists and was not written by this exporter", hint=hint)
    if overwrite:
        _refuse_nest(target)
        return None
    manifest = read_manifest(target)
    assert manifest is not None
    if different := manifest.recipe.differences(plan.recipe):
        raise ExportError(f"{target} holds a different export ({'; '.join(different)})", hint=_OVERWRITE)
    if damage := manifest.damage(target):
        raise ExportError(f"{target} is damaged: {damage}", hint="--overwrite_models exports it again")
    if plan.request.verify and manifest.verified is None:
        raise ExportError(f"{target} was exported without --verify", hint="--overwrite_models exports and verifies it")
    return manifest


def check_drift(request: ExportRequest, drift: Drift) -> None:
    """Raise ExportError if the model is further from its source than the request lets pass."""
    if request.max_drift is not None and drift.mean_kl > request.max_drift:
        raise ExportError(
            f"the mean KL divergence is {drift.mean_kl:.2g}, above --verify_threshold {request.max_drift:g} ({drift})",
            hint="a larger --weight-format, or other --extra_quantization_params, keep more",
        )


def _weight_format(request: ExportRequest, source: Source) -> WeightFormat:
    """Return how the weights will be stored; what an OpenVINO model cannot be asked for is refused, with the reason."""
    if source.kind is not SourceKind.OPENVINO:
        return request.weight_format or default_format(request.engine.device)
    stored = stored_format(source.path)
    what = f"{request.source_model} is an OpenVINO model, which is registered as it is"
    if request.adapters:
        raise UsageError(
            f"{what}: --adapter cannot be merged into weights that are converted already",
            hint="give the PyTorch model as --source_model, or the adapter as --source_loras",
        )
    if request.weight_format not in (None, stored):
        raise UsageError(
            f"{what}: its weights are {stored}, not {request.weight_format}",
            hint=f"leave --weight-format out, or export the PyTorch model to {request.weight_format}",
        )
    if request.compression is not None or request.verify:
        flag = "--verify" if request.verify else "--extra_quantization_params"
        raise UsageError(f"{what}: {flag} needs the PyTorch model", hint=f"leave {flag} out")
    return stored


def _compression(request: ExportRequest, source: Source) -> Compression:
    if source.kind is SourceKind.OPENVINO:
        return Compression()
    return request.compression or default_compression(request.engine.device)


def _sources(request: ExportRequest) -> str:
    merged = [adapter.source for adapter in request.adapters]
    beside = [adapter.source for adapter in request.loras.adapters]
    draft = [request.draft_source] if request.draft_source else []
    return ", ".join([request.source_model, *merged, *beside, *draft])


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
    weight_format: WeightFormat,
    compression: Compression,
    adapters: tuple[PeftFolder, ...],
    tokenizer: Path | None,
    progress: ExportProgress,
) -> Recipe:
    with progress.step("hash", request.source_model, total=source.size) as step:
        record = SourceRecord(source=source.given, digest=source.digest(step.advance))
    return Recipe(
        source=record,
        weight_format=weight_format,
        compression={name: value for name, value in compression.chosen.items() if name != "dataset"},
        calibration=_calibration_record(compression.dataset),
        adapters=tuple(MergedAdapter(source=a.given, digest=a.digest, weight=a.weight) for a in adapters),
        tokenizer=_tokenizer_record(request, tokenizer),
        engine=asdict(request.engine),
    )


def _tokenizer_record(request: ExportRequest, folder: Path | None) -> SourceRecord | None:
    if folder is None or request.tokenizer is None:
        return None
    return SourceRecord(source=request.tokenizer, digest=files_digest(content_files(folder), folder))


def _calibration_record(dataset: Path | None) -> SourceRecord | None:
    return None if dataset is None else SourceRecord(source=str(dataset), digest=file_digest(dataset))
