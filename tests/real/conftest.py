"""The real SmolLM2 in the forms that the tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.exports import export


@pytest.fixture(scope="session")
def exact_base() -> Path:
    """The base in fp32, to be computed in f32: the numbers of transformers."""
    return export("exact_base")


@pytest.fixture(scope="session")
def exact_merged() -> Path:
    """Base and `sql` adapter merged, as exact as the base."""
    return export("exact_merged")


@pytest.fixture(scope="session")
def int8_base() -> Path:
    """The base in int8, as the demo has it."""
    return export("int8_base")


@pytest.fixture(scope="session")
def int8_merged() -> Path:
    """Base and `sql` adapter merged, in int8, as the demo has it."""
    return export("int8_merged")
