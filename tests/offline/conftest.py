"""Models that tests share."""

from __future__ import annotations

import pytest

from tests.engine.lora_models import Base, Bases


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny Llama, in PyTorch and exported."""
    return Bases(tmp_path_factory.mktemp("bases")).get("llama")
