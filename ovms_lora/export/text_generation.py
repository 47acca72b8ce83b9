"""One `text_generation` export from its request to the published folder.

Owns: the order of the steps. Each step is in the module that it is named after.
"""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

from ovms_lora.core.graph_pbtxt import render_graph
from ovms_lora.export import compress, convert, merge, verify
from ovms_lora.export.compression import default_compression
from ovms_lora.export.config_file import register
from ovms_lora.export.digests import file_digest
from ovms_lora.export.draft import check_same_tokens
from ovms_lora.export.gguf import to_hf_folder
from ovms_lora.export.loras import publish_adapters, stage_adapters
from ovms_lora.export.manifest import Drift, FileRecord, Manifest, installed_versions, write_manifest
from ovms_lora.export.peft_folder import check_fits
from ovms_lora.export.plan import Plan, check_drift, make_plan, present
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.publish import locked, publish, staging
from ovms_lora.export.request import ExportRequest
from ovms_lora.export.resources import check_resources
from ovms_lora.export.source import SourceKind, tensor_shapes, weight_files


def export_text_generation(request: ExportRequest, progress: ExportProgress) -> Path:
    """Export a model into the repository and register it in config.json; returns its folder.

    A folder that already holds the same export is left alone. Raises OvmsLoraError; whatever fails, nothing that
    could be taken for a model is left behind.
    """
    plan = make_plan(request, progress)
    with locked(request.repository, plan.name), staging(request.repository, plan.name) as folder:
        model = None
        if manifest := present(plan):
            progress.note(f"{plan.target} is exported from the same sources already: nothing to do")
            if request.verify and manifest.verified:
                _judge(plan, manifest.verified, progress)
        else:
            check_resources(plan)
            if draft := _draft_plan(plan):
                check_resources(draft)
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
    drift = None
    if plan.source.kind is SourceKind.OPENVINO:
        _copy(plan, model, progress)
    else:
        drift = _export(plan, model, work, progress)
    if draft := _draft_plan(plan):
        _add_draft(draft, model / draft.name, work / "draft", progress)
        check_same_tokens(model, model / draft.name)
    shutil.rmtree(work)
    (model / "graph.pbtxt").write_text(render_graph(plan.request.engine), encoding="utf-8")
    with progress.step("check", "the graph takes paged attention"), progress.silence():
        convert.check_ir(model, module_names=plan.source.kind is not SourceKind.OPENVINO)
    _write_manifest(plan, model, drift, progress)
    return model


def _draft_plan(plan: Plan) -> Plan | None:
    """Return the draft model's part of a plan as a plan of its own."""
    draft = plan.draft
    if draft is None:
        return None
    return replace(
        plan,
        request=draft.request,
        name=draft.name,
        source=draft.source,
        adapters=(),
        loras=(),
        tokenizer=None,
        weight_format=draft.weight_format,
        compression=default_compression(plan.request.engine.device),
        draft=None,
    )


def _add_draft(plan: Plan, folder: Path, work: Path, progress: ExportProgress) -> None:
    """Build a draft model inside the folder of the model."""
    folder.mkdir()
    work.mkdir()
    if plan.source.kind is SourceKind.OPENVINO:
        _copy(plan, folder, progress)
    else:
        _export(plan, folder, work, progress)


def _copy(plan: Plan, folder: Path, progress: ExportProgress) -> None:
    """Take the files of an OpenVINO model over as they are."""
    with progress.step("copy", plan.request.source_model, total=plan.source.size) as step:
        for path in plan.source.files:
            shutil.copyfile(path, folder / path.name)
            step.advance(path.stat().st_size)


def _export(plan: Plan, folder: Path, work: Path, progress: ExportProgress) -> Drift | None:
    """Write IR and tokenizer into `folder`; returns how far the IR is from the PyTorch model, where that is asked."""
    request = plan.request
    expected = _convert(plan, _hf_folder(plan, work, progress), folder, progress)
    if plan.weight_format.compressed:
        with progress.step("compress", f"weights to {plan.weight_format}"), progress.silence():
            compress.compress(folder, work, plan.weight_format, plan.compression)
    if not request.verify:
        return None
    with progress.step("verify", "the exported model against the PyTorch model"), progress.silence():
        drift = verify.measure_drift(folder, expected)
    _judge(plan, drift, progress)
    return drift


def _judge(plan: Plan, drift: Drift, progress: ExportProgress) -> None:
    progress.note(f"verified: {drift}")
    check_drift(plan.request, drift)


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


def _convert(plan: Plan, source: Path, folder: Path, progress: ExportProgress) -> list[verify.Expected]:
    """Load, merge and convert; returns what the PyTorch model says to the prompts of a verification.

    The PyTorch model is gone when this returns, before compression takes its memory.
    """
    request = plan.request
    with progress.step("load", request.source_model), progress.silence():
        dtype = merge.choose_dtype(source, plan.weight_format, merging=bool(plan.adapters))
        tokenizer = merge.load_tokenizer(plan.tokenizer or source, trust_remote_code=request.trust_remote_code)
        model = merge.load_model(source, dtype=dtype, trust_remote_code=request.trust_remote_code)
        if plan.tokenizer:
            merge.fit_vocabulary(model, tokenizer)
    for adapter in plan.adapters:
        with progress.step("merge", f"{adapter.given} at weight {adapter.weight:g}"), progress.silence():
            model = merge.merge_adapter(model, adapter)
    expected = []
    if request.verify:
        with progress.step("compute", "what the PyTorch model says"), progress.silence():
            expected = verify.expect(model, tokenizer)
    with progress.step("convert", "to OpenVINO IR"), progress.silence():
        convert.write_ir(model, folder, plan.weight_format, trust_remote_code=request.trust_remote_code)
        served_by_ovms = convert.write_tokenizer(tokenizer, plan.tokenizer or source, folder)
    if (source / "generation_config.json").is_file():
        # optimum drops a file that transformers finds fault with; its defaults and stop tokens still count.
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    if not served_by_ovms:
        progress.note("note: OpenVINO has no form of this tokenizer, so that a stock OVMS cannot serve the folder")
    del model
    gc.collect()
    return expected


def _write_manifest(plan: Plan, folder: Path, drift: Drift | None, progress: ExportProgress) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    files = {}
    with progress.step("hash", f"{len(paths)} files", total=total) as step:
        for path in paths:
            record = FileRecord(size=path.stat().st_size, sha256=file_digest(path, step.advance))
            files[path.relative_to(folder).as_posix()] = record
    manifest = Manifest(name=plan.name, recipe=plan.recipe, verified=drift, versions=installed_versions(), files=files)
    write_manifest(folder, manifest)
