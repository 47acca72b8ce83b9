"""What all tests share: the process's OpenVINO Core comes first, and its signal stack stays (see engine/device.py)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ovms_lora.engine.device import openvino_core

# Asking for a property loads the CPU device, also where other libraries make Cores of their own later.
openvino_core().get_property("CPU", "FULL_DEVICE_NAME")

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

_OPT_IN = {"slow": "also run the tests marked slow", "image": "also build the container images and run them"}


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, text in _OPT_IN.items():
        parser.addoption(f"--{marker}", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [marker for marker in _OPT_IN if not config.getoption(f"--{marker}")]
    deselected = [item for item in items if any(item.get_closest_marker(marker) for marker in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests stay to the end; looking through them takes half a second each time


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[ObjectStore]:
    from tests.object_store import ObjectStore  # moto takes a while to load

    server = ObjectStore()
    yield server
    server.stop()


@pytest.fixture
def store(object_store_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A server of buckets, with its address and credentials in the environment."""
    for name, value in object_store_server.environment.items():
        monkeypatch.setenv(name, value)
    yield object_store_server
    object_store_server.heal()
