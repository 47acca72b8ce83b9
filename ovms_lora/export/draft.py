"""The draft model of an export: a smaller one in the model's folder, with which a server guesses ahead.

Owns: which source it is, under which name, in which format, and that its tokens are those of the model.
Does not know: how a model is converted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ovms_lora.core.errors import ConfigError, ExportError, UsageError
from ovms_lora.core.names import check_model_name
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.export.compression import default_format
from ovms_lora.export.openvino_folder import stored_format
from ovms_lora.export.request import ExportRequest, SourceLoras
from ovms_lora.export.source import Source, SourceKind, find_model, read_json
from ovms_lora.export.weight_format import WeightFormat

_TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model that exists. `request` is what an export of it alone would be asked."""

    name: str
    source: Source
    weight_format: WeightFormat
    request: ExportRequest

    @property
    def digest(self) -> str:
        """The identity of its source."""
        return self.source.digest(lambda _: None)

    @property
    def speculation(self) -> SpeculationOptions:
        """How a server is told of it."""
        return SpeculationOptions(draft_models_path=f"./{self.name}")


def find_draft(request: ExportRequest) -> Draft | None:
    """Find the draft model that the request names. Raises UsageError or ExportError."""
    if request.draft_source is None:
        return None
    source = find_model(request.draft_source, trust_remote_code=request.trust_remote_code)
    given = request.draft_name or source.default_name
    try:
        name = check_model_name(given.replace("/", "-"))  # one folder, as OVMS's exporter names it
    except ConfigError as error:
        raise UsageError(error.message, hint="choose another with --draft_model_name") from error
    converted = source.kind is SourceKind.OPENVINO
    wanted = request.weight_format or default_format(request.engine.device)
    alone = replace(
        request,
        source_model=request.draft_source,
        compression=None,
        adapters=(),
        tokenizer=None,
        loras=SourceLoras(),
        verify=False,
        max_drift=None,
        draft_source=None,
        draft_name=None,
    )
    return Draft(name, source, stored_format(source.path) if converted else wanted, alone)


def check_same_tokens(model: Path, draft: Path) -> None:
    """Raise ExportError unless two exported folders have the same tokens with the same ids."""
    import tokenizers

    for folder in (model, draft):
        if not (folder / _TOKENIZER).is_file():
            raise ExportError(f"{folder.name} has no {_TOKENIZER}, so that tokens cannot be compared")
        read_json(folder / _TOKENIZER)
    ours, theirs = (tokenizers.Tokenizer.from_file(str(each / _TOKENIZER)).get_vocab() for each in (model, draft))
    if ours != theirs:
        different = next(iter(sorted(ours.items() ^ theirs.items(), key=lambda item: item[1])))
        raise ExportError(
            f"the draft model has other tokens than the model: {different[0]!a} with id {different[1]} is in one only",
            hint="take a draft model of the same family, with the same tokenizer",
        )
