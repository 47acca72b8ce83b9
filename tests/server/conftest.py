from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.server.serving import Served, serving


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as server:
        yield server


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Served]:
    """A server that the tests of a module share: they ask it things and leave it as it is."""
    async with serving() as server:
        yield server
