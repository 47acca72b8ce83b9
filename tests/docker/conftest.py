"""The images of one session, removed at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.docker.images import Images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.fail(
            "these tests need root, buildah and debootstrap: apt-get install buildah debootstrap", pytrace=False
        )
    images = Images(tmp_path_factory.mktemp("images"))
    try:
        images.make_base()
        yield images
    finally:
        images.remove()
