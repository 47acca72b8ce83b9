"""One `text_generation` export from its request to the published folder.

Owns: the order of the steps. Each step is in the module that it is named after.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

from ovms_lora.core.graph_pbtxt import render_graph
from ovms_lora.export import convert, merge
from ovms_lora.export.config_file import register
from ovms_lora.export.digests import file_digest
from ovms_lora.export.gguf import to_hf_folder
from ovms_lora.export.loras import publish_adapters, stage_adapters
from ovms_lora.export.manifest import FileRecord, Manifest, installed_versions, write_manifest
from ovms_lora.export.peft_folder import check_fits
from ovms_lora.export.plan import Plan, check_space, make_plan, nothing_to_do
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.publish import locked, publish, staging
from ovms_lora.export.request import ExportRequest
from ovms_lora.export.source import SourceKind, tensor_shapes, weight_files


def export_text_generation(request: ExportRequest, progress: ExportProgress) -> Path:
    """Export a model into the repository and register it in config.json; returns its folder.

    A folder that already holds the same export is left alone. Raises OvmsLoraError; whatever fails, nothing that
    could be taken for a model is left behind.
    """
    plan = make_plan(request, progress)
    with locked(request.repository, plan.name), staging(request.repository, plan.name) as folder:
        model = None
        if nothing_to_do(plan):
            progress.note(f"{plan.target} is exported from the same sources already: nothing to do")
        else:
            check_space(plan)
            model = _build(plan, folder, progress)
        _stage_adapters(plan, folder, model or plan.target, progress)
        if model is not None:
            publish(model, request.repository, plan.name)
        publish_adapters(plan.loras, folder, request.repository)
    if register(request.config_file, plan.registration):
        progress.note(f"{request.config_file} now names {plan.name}")
    return plan.target


def _build(plan: Plan, folder: Path, progress: ExportProgress) -> Path:
    """Build the complete model folder inside the staging folder and return it."""
    work, model = folder / "work", folder / "model"
    work.mkdir()
    model.mkdir()
    source = _hf_folder(plan, work, progress)
    _convert(plan, source, model, progress)
    if plan.request.weight_format.compressed:
        with progress.step("compress", f"weights to {plan.request.weight_format}"), progress.silence():
            convert.compress(model, work, plan.request.weight_format)
    shutil.rmtree(work)
    (model / "graph.pbtxt").write_text(render_graph(plan.request.engine), encoding="utf-8")
    with progress.step("check", "the graph takes paged attention"), progress.silence():
        convert.check_ir(model)
    _write_manifest(plan, model, progress)
    return model


def _stage_adapters(plan: Plan, folder: Path, base: Path, progress: ExportProgress) -> None:
    if plan.loras:
        with progress.step("adapters", ", ".join(lora.alias for lora in plan.loras)):
            stage_adapters(plan.loras, folder, base)


def _hf_folder(plan: Plan, work: Path, progress: ExportProgress) -> Path:
    """Return the source as a Hugging Face folder."""
    if plan.source.kind is SourceKind.FOLDER:
        return plan.source.path
    folder = work / "hf"
    folder.mkdir()
    with progress.step("unpack", str(plan.source.path)), progress.silence():
        to_hf_folder(plan.source.path, folder)
    shapes = tensor_shapes(weight_files(folder))
    for adapter in plan.adapters:
        check_fits(adapter, shapes, resized=plan.tokenizer is not None)
    return folder


def _convert(plan: Plan, source: Path, folder: Path, progress: ExportProgress) -> None:
    """Load, merge and convert. The PyTorch model is gone when this returns, before compression takes its memory."""
    request = plan.request
    with progress.step("load", request.source_model), progress.silence():
        dtype = merge.choose_dtype(source, request.weight_format, merging=bool(plan.adapters))
        tokenizer = merge.load_tokenizer(plan.tokenizer or source, trust_remote_code=request.trust_remote_code)
        model = merge.load_model(source, dtype=dtype, trust_remote_code=request.trust_remote_code)
        if plan.tokenizer:
            merge.fit_vocabulary(model, tokenizer)
    for adapter in plan.adapters:
        with progress.step("merge", f"{adapter.given} at weight {adapter.weight:g}"), progress.silence():
            model = merge.merge_adapter(model, adapter)
    with progress.step("convert", "to OpenVINO IR"), progress.silence():
        convert.write_ir(model, folder, request.weight_format, trust_remote_code=request.trust_remote_code)
        served_by_ovms = convert.write_tokenizer(tokenizer, plan.tokenizer or source, folder)
    if (source / "generation_config.json").is_file():
        # optimum drops a file that transformers finds fault with; its defaults and stop tokens still count.
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    if not served_by_ovms:
        progress.note("note: OpenVINO has no form of this tokenizer, so that a stock OVMS cannot serve the folder")
    del model
    gc.collect()


def _write_manifest(plan: Plan, folder: Path, progress: ExportProgress) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    files = {}
    with progress.step("hash", f"{len(paths)} files", total=total) as step:
        for path in paths:
            record = FileRecord(size=path.stat().st_size, sha256=file_digest(path, step.advance))
            files[path.relative_to(folder).as_posix()] = record
    write_manifest(folder, Manifest(name=plan.name, recipe=plan.recipe, versions=installed_versions(), files=files))
