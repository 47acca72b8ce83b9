"""Which template a folder's files mean."""

from __future__ import annotations

from typing import Any

import pytest

from ovms_lora.core.chat_template import TemplateSource, template_source

NAMED = [{"name": "tool_use", "template": "with"}, {"name": "default", "template": "plain"}, {"name": "rag"}, "x"]


@pytest.mark.parametrize(
    ("jinja", "configured", "expected"),
    [
        (None, None, None),
        (None, 5, None),
        (None, [], None),
        (None, [{"name": "tool_use", "template": "with"}], None),
        (None, "config", ("config", None)),
        ("file", "config", ("file", None)),
        ("", "config", ("", None)),
        (None, NAMED, ("plain", "with")),
        ("file", NAMED, ("file", None)),
    ],
)
def test_the_template_is_found(jinja: str | None, configured: Any, expected: tuple[str, str | None] | None) -> None:
    source = template_source(jinja, {"chat_template": configured})
    assert source == (None if expected is None else TemplateSource(*expected))


def test_special_tokens_come_with_it() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "unk_token": {"content": 1}}
    source = template_source("x", config)
    assert source
    assert source.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
