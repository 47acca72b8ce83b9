"""ChatTemplate: messages to one prompt text, by the Jinja template of a model or adapter folder.

Owns how templates are found in a model's folder and which variables they get. They run elsewhere, with bounds on time
and memory (`template_process`). Knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovms_lora.core.chat_template import TemplateSource, template_source
from ovms_lora.core.errors import InvalidFieldError, ModelFolderError
from ovms_lora.engine.template_process import FOR_MODELS, TemplateKilledError, TemplateProcesses

TEMPLATE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"

_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_CONFIG_BYTES = 16 << 20  # tokenizer_config.json lists all added tokens
_KILLED = "the chat template takes too much time or memory"


class ChatTemplate:
    """One template, or two where requests with tools have their own."""

    def __init__(self, source: str | TemplateSource, *, processes: TemplateProcesses = FOR_MODELS) -> None:
        """Check that `source` compiles. Raises ModelFolderError."""
        self._source = TemplateSource(source) if isinstance(source, str) else source
        self._processes = processes
        for text in {self._source.default, self._source.tool_use} - {None}:
            try:
                answer = processes.ask({"source": text})
            except TemplateKilledError as error:
                raise ModelFolderError(_KILLED) from error
            if "broken" in answer:
                raise ModelFolderError(f"the chat template does not compile: {answer['broken']}")

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """Read `chat_template.jinja`, or the template within tokenizer_config.json; None when there is neither."""
        path = folder / TEMPLATE_NAME
        text = _read_text(path, _MAX_TEMPLATE_BYTES) if path.is_file() else None
        source = template_source(text, _read_object(folder / CONFIG_NAME))
        return None if source is None else cls(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt text of the messages. Raises InvalidFieldError when the template refuses them."""
        source = self._source
        text = source.tool_use if tools and source.tool_use is not None else source.default
        values = {
            **source.special_tokens,
            **variables,
            "messages": list(messages),
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            answer = self._processes.ask({"source": text, "values": values})
        except TemplateKilledError as error:
            raise InvalidFieldError(_KILLED, param="messages") from error
        if "text" in answer:
            return answer["text"]
        why = answer.get("refused", answer.get("broken"))
        raise InvalidFieldError(f"the chat template refused the messages: {why}", param="messages")


def _read_text(path: Path, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise ModelFolderError(f"{path} is larger than {limit} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"cannot read {path}: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}", hint="export the model again") from error
    return value if isinstance(value, dict) else {}
