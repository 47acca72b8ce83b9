"""One Ray for the session, with two replicas that the tests share and leave as they are."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.engine.lora_models import Bases
from tests.object_store import ObjectStore
from tests.scale.fleet import Fleet, cluster, fleet_config, write_repository


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, object_store_server: ObjectStore) -> Iterator[Fleet]:
    base = Bases(tmp_path_factory.mktemp("bases")).get("llama")
    path = write_repository(base, tmp_path_factory.mktemp("repository"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with cluster(port, object_store_server.environment):
        fleet = Fleet(f"http://127.0.0.1:{port}", path, fleet_config(path))
        fleet.deploy()
        yield fleet
