"""The flag that changes limits."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ovms_lora.core.errors import UsageError
from ovms_lora.server.limit_flags import MEANINGS, limits_of
from ovms_lora.server.options import Limits


def test_every_limit_has_a_meaning() -> None:
    assert list(MEANINGS) == [field.name for field in fields(Limits)]


def test_what_is_not_named_stays() -> None:
    assert limits_of([]) == Limits()
    changed = limits_of(["body_bytes=100", "request-seconds=0.5", "body_bytes=200"])
    assert changed == Limits(body_bytes=200, request_seconds=0.5)


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ("x=1", "names no limit", "there are connections"),
        ("", "names no limit", "there are"),
        ("body_byte=1", "names no limit", "did you mean body_bytes?"),
        ("body_bytes", "names no limit", "did you mean body_bytes?"),
        ("body_bytes=", "not a whole number", "like"),
        ("body_bytes=0", "not a whole number", "like"),
        ("body_bytes=-1", "not a whole number", "like"),
        ("body_bytes=1.5", "not a whole number", "like"),
        ("body_bytes=99999999999999", "not a whole number", "like"),
        ("request_seconds=0", "not a number above 0", "like"),
        ("request_seconds=nan", "not a number above 0", "like"),
        ("request_seconds=inf", "not a number above 0", "like"),
        ("request_seconds=1=2", "not a number above 0", "like"),
    ],
)
def test_what_is_no_limit_is_refused(change: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        limits_of([change])
    assert message in raised.value.message
    assert hint in (raised.value.hint or "")
