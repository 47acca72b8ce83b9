"""Hypothesis on machines that are busy with other things: no time limits of its own. And models that tests share."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.engine.lora_models import Bases

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tiny models by name, exported when first wanted."""
    return Bases(tmp_path_factory.mktemp("bases"))
