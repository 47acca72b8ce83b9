"""TemplateSource: the chat template of a model or an adapter as it stands in its files. Knows no Jinja."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """`tool_use` is taken, where there is one, for requests with tools. A template may name its special tokens."""

    default: str
    tool_use: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def template_source(jinja_file: str | None, tokenizer_config: Mapping[str, Any]) -> TemplateSource | None:
    """Return the template in `chat_template.jinja`, else that in tokenizer_config.json, if either has one.

    tokenizer_config.json may hold one template, or several with names.
    """
    configured = tokenizer_config.get("chat_template")
    named = configured if isinstance(configured, list) else [{"name": "default", "template": configured}]
    templates = {
        entry["name"]: entry["template"]
        for entry in named
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    default = templates.get("default") if jinja_file is None else jinja_file
    if default is None:
        return None
    texts = {name: _token_text(tokenizer_config.get(name)) for name in _TOKEN_NAMES}
    special_tokens = {name: text for name, text in texts.items() if text is not None}
    return TemplateSource(default, None if jinja_file is not None else templates.get("tool_use"), special_tokens)


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
