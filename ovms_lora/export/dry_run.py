"""`--dry_run`: what an export would fetch, merge, convert and write, and how large that is. Changes nothing.

Owns: the lines of the plan. Whatever the export would refuse before its long work, this refuses in the same words.
Does not know: how any of it is done.
"""

from __future__ import annotations

from collections.abc import Iterator

from ovms_lora.export import hub
from ovms_lora.export.config_file import registration_changes
from ovms_lora.export.peft_folder import FILES as ADAPTER_FILES
from ovms_lora.export.plan import Plan, make_plan, present
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.request import ExportRequest
from ovms_lora.export.resources import available_memory, estimate, gigabytes
from ovms_lora.export.source import TOKENIZER_PATTERNS, SourceKind, is_local, model_patterns


def dry_run(request: ExportRequest, progress: ExportProgress) -> Iterator[str]:
    """Yield the plan, a line a step. Raises OvmsLoraError as the export would before its long work."""
    fetched = list(_to_fetch(request))
    yield from fetched
    if fetched:
        yield "then      the plan goes on once these files are here: sizes and shapes are read from them"
        return
    plan = make_plan(request, progress)
    if present(plan):
        yield f"nothing   {plan.target} is exported from the same sources already"
    else:
        yield from _work(plan)
    for lora in plan.loras:
        yield f"adapter   {lora.alias} of rank {lora.rank} to {request.repository / lora.place}, for run time"
    change = "adds" if registration_changes(request.config_file, plan.registration) else "has already"
    yield f"register  {request.config_file} {change} {plan.name}"


def _to_fetch(request: ExportRequest) -> Iterator[str]:
    model = (request.source_model, "model", model_patterns(trust_remote_code=request.trust_remote_code))
    sources = [] if request.source_model.endswith(".gguf") else [model]
    if request.draft_source and not request.draft_source.endswith(".gguf"):
        sources.append((request.draft_source, *model[1:]))
    if request.tokenizer:
        sources.append((request.tokenizer, "tokenizer", TOKENIZER_PATTERNS))
    adapters = [merged.source for merged in request.adapters] + [lora.source for lora in request.loras.adapters]
    sources += [(source, "adapter", ADAPTER_FILES) for source in dict.fromkeys(adapters)]
    for given, what, patterns in sources:
        if is_local(given, what):
            continue
        needed = hub.ask(given, what, patterns)
        if needed.files:
            yield f"fetch     {what} {given}: {needed.files} files, {gigabytes(needed.size)}"


def _work(plan: Plan) -> Iterator[str]:
    request, needs = plan.request, estimate(plan)
    yield f"read      {request.source_model}: {gigabytes(plan.source.size)}"
    if plan.source.kind is SourceKind.GGUF:
        yield "unpack    the GGUF file to float32"
    for adapter in plan.adapters:
        size = sum((adapter.path / name).stat().st_size for name in ADAPTER_FILES)
        yield f"merge     {adapter.given} at weight {adapter.weight:g}: {gigabytes(size)}"
    if plan.source.kind is SourceKind.OPENVINO:
        yield f"copy      the OpenVINO model as it is, with {plan.weight_format} weights"
    else:
        yield f"convert   to OpenVINO IR with {plan.weight_format} weights{_options(plan)}"
    if draft := plan.draft:
        yield f"draft     {draft.source.given} with {draft.weight_format} weights, to {draft.name}/ in the same folder"
    if request.verify:
        yield "verify    the exported model against the PyTorch model"
    verb = "replace" if plan.target.exists() else "write  "
    yield f"{verb}   {plan.target}: about {gigabytes(needs.written)}"
    memory = available_memory()
    have = "" if memory is None else f" of {gigabytes(memory)} available"
    yield f"needs     about {gigabytes(needs.disk)} of disk at the peak, and {gigabytes(needs.memory)} of memory{have}"


def _options(plan: Plan) -> str:
    chosen = ", ".join(f"{name} {value}" for name, value in plan.compression.chosen.items())
    return f" ({chosen})" if chosen else ""
