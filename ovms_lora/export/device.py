"""The process's one OpenVINO Core: see `ovms_lora/engine/device.py` for why it must never be freed."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def openvino_core() -> Any:
    """Return the Core; it has loaded the CPU device before nncf does so with Cores that come and go."""
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return core
