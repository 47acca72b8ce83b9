"""The chat template that an adapter folder may bring along, as PEFT and TRL save it beside the adapter.

Owns which files hold it and how large they may be. It is text of a stranger: nothing here runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ovms_lora.adapters.adapter_folder import AdapterFile, AdapterFolder
from ovms_lora.adapters.strict_json import parse_object
from ovms_lora.core.chat_template import TemplateSource, template_source
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

_MAX_TEMPLATE_BYTES = 256 << 10
# It lists all added tokens: Gemma's some 6,400, of seven values each, in 1.2 MB.
_MAX_CONFIG_BYTES = 4 << 20
_MAX_CONFIG_CONTAINERS = 20_000
_MAX_CONFIG_VALUES = 80_000
_MAX_CONFIG_DEPTH = 16


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """The template, if the folder has one, and the files that it was read from."""

    source: TemplateSource | None
    files: tuple[AdapterFile, ...] = ()


def read_template_files(folder: AdapterFolder) -> TemplateFiles:
    """Read chat_template.jinja and tokenizer_config.json as far as they are there.

    Raises AdapterError(CONFIG_INVALID) for files that are too large or not what they should be.
    """
    jinja, config = (
        folder.open_if_there(name, unusable=AdapterErrorCode.CONFIG_INVALID)
        for name in (TEMPLATE_NAME, TOKENIZER_CONFIG_NAME)
    )
    text = None if jinja is None else _text(jinja)
    source = template_source(text, {} if config is None else _object(config))
    if source is not None and max(len(source.default), len(source.tool_use or "")) > _MAX_TEMPLATE_BYTES:
        raise _too_large(f"the chat template in {TOKENIZER_CONFIG_NAME}", _MAX_TEMPLATE_BYTES)
    return TemplateFiles(source, tuple(file for file in (jinja, config) if file is not None))


def _text(file: AdapterFile) -> str:
    try:
        return _bytes(file, _MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(AdapterErrorCode.CONFIG_INVALID, f"{file.name} is not UTF-8 text") from error


def _object(file: AdapterFile) -> dict[str, Any]:
    return parse_object(
        _bytes(file, _MAX_CONFIG_BYTES),
        what=file.name,
        code=AdapterErrorCode.CONFIG_INVALID,
        max_containers=_MAX_CONFIG_CONTAINERS,
        max_values=_MAX_CONFIG_VALUES,
        max_depth=_MAX_CONFIG_DEPTH,
    )


def _bytes(file: AdapterFile, limit: int) -> bytes:
    if file.size > limit:
        raise _too_large(file.name, limit)
    return file.read(0, file.size)


def _too_large(what: str, limit: int) -> AdapterError:
    return AdapterError(AdapterErrorCode.CONFIG_INVALID, f"{what} is larger than {limit} bytes")
