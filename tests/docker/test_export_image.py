"""The exporter's image, built and run: an export into a volume, under a read-only root. Runs with --image, as root.

The build downloads torch and all libraries of the exporter.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ovms_lora.core.config import read_server_config
from tests.docker.images import Image, Images, running
from tests.tiny_llama import build_tiny_adapter, build_tiny_llama

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def image(images: Images) -> Image:
    return images.build("docker/Dockerfile.export")


def test_it_exports_a_merged_model_that_its_user_owns(image: Image, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    build_tiny_llama(volume / "base")
    build_tiny_adapter(volume / "sql", volume / "base")
    uid, gid = map(int, image.config["User"].split(":"))
    for path in (volume, *volume.rglob("*")):
        os.chown(path, uid, gid)
    arguments = ["text_generation", "--source_model", "base", "--adapter", "sql", "--model_repository_path", "."]
    with running(image, *arguments, "--model_name", "merged_model", volume=f"{volume}:/workspace:rw") as container:
        assert container.process.wait(timeout=600) == 0, container.log()
    (model,) = read_server_config(volume / "config.json").models
    assert (model.name, model.base_path) == ("merged_model", "merged_model")
    assert (volume / "merged_model" / "openvino_model.xml").stat().st_uid == uid


def test_without_flags_it_says_which_there_are(image: Image, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # the volume is the working folder
    with running(image, *image.config["Cmd"], volume=f"{tmp_path}:/workspace:rw") as container:
        assert container.process.wait(timeout=60) == 0
        assert container.log().startswith("usage: ovms-lora export")
