"""What all tests share: the process's OpenVINO Core comes first, and its signal stack stays (see engine/device.py)."""

from __future__ import annotations

import pytest

from ovms_lora.engine.device import openvino_core

# Asking for a property loads the CPU device, also where other libraries make Cores of their own later.
openvino_core().get_property("CPU", "FULL_DEVICE_NAME")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
