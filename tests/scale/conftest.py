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
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, proxy_port = one.getsockname()[1], other.getsockname()[1]
    with cluster(proxy_port, object_store_server.environment):
        fleet = Fleet(port, proxy_port, path, fleet_config(path))
        fleet.deploy()
        yield fleet


@pytest.fixture(params=["own port", "Serve's proxy"])
def asked(fleet: Fleet, request: pytest.FixtureRequest) -> Fleet:
    """The fleet, asked in both ways."""
    return fleet if request.param == "own port" else fleet.proxied()
