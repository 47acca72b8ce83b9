"""ChatTemplate: messages to one prompt text, by the Jinja template of a model or adapter folder, in a sandbox.

The template is part of a folder that may not be trusted: it sees immutable data, can reach no Python attribute, and its
output is bounded. Knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ovms_lora.core.errors import InvalidFieldError, ModelFolderError

_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_CONFIG_BYTES = 16 << 20  # tokenizer_config.json lists all added tokens
_MAX_OUTPUT_CHARS = 8 << 20
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile `source`. Raises ModelFolderError when it is not a template."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ModelFolderError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """Read `chat_template.jinja`, or the template within tokenizer_config.json; None when there is neither."""
        config = _read_object(folder / "tokenizer_config.json")
        path = folder / "chat_template.jinja"
        source = _read_text(path, _MAX_TEMPLATE_BYTES) if path.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several named templates: the default one
            named = (entry for entry in source if isinstance(entry, dict))
            source = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            return None
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return cls(source, {name: text for name in names if (text := _token_text(config.get(name))) is not None})

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
        values = {**self._special_tokens, **variables, "messages": list(messages), "tools": tools or None}
        size, parts = 0, []
        try:
            for part in self._template.generate(**values, add_generation_prompt=add_generation_prompt):
                size += len(part)
                if size > _MAX_OUTPUT_CHARS:
                    raise InvalidFieldError("the rendered chat template is too long", param="messages")
                parts.append(part)
        except _REFUSALS as error:
            raise InvalidFieldError(f"the chat template refused the messages: {error}", param="messages") from error
        return "".join(parts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; templates of language models expect plain JSON, and transformers' parameters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


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
