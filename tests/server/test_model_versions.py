"""Version folders of OVMS: which one is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.server.model_source import ConfigFile
from ovms_lora.server.model_versions import VersionFolder, find_version
from tests.server.serving import serving
from tests.server.test_models import config, reload


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("present", "allowed", "served"),
    [
        (("1",), None, 1),
        (("1", "2", "10"), None, 10),
        (("1", "2", "3"), (1, 2), 2),
        (("1", "02", "0", "-3", "v4", "\uff15"), None, 1),
        (("1",), (7, 5), 7),
    ],
)
def test_the_highest_that_may_be_is_served(
    tmp_path: Path, present: tuple[str, ...], allowed: tuple[int, ...] | None, served: int
) -> None:
    assert find_version(folders(tmp_path, *present), allowed) == VersionFolder(tmp_path / str(served), served)


@pytest.mark.parametrize("file", ["graph.pbtxt", "openvino_model.xml"])
def test_a_folder_that_is_a_model_itself_has_no_versions(tmp_path: Path, file: str) -> None:
    (folders(tmp_path, "1", "2") / file).touch()
    assert find_version(tmp_path) == VersionFolder(tmp_path, 1)


@pytest.mark.parametrize("name", ["", "gone"])
def test_a_folder_without_versions_is_served_itself(tmp_path: Path, name: str) -> None:
    assert find_version(tmp_path / name) == VersionFolder(tmp_path / name, 1)


def test_config_json_chooses(tmp_path: Path) -> None:
    folders(tmp_path / "m", "1", "2")
    path = tmp_path / "config.json"
    for policy, version in (({"latest": {}}, 2), ({"specific": {"versions": [1]}}, 1)):
        entry: dict[str, Any] = {"name": "m", "base_path": "m", "model_version_policy": policy}
        path.write_text(json.dumps({"model_config_list": [{"config": entry}]}))
        (spec,) = ConfigFile(path).read()
        assert (spec.folder, spec.version) == (tmp_path / "m" / str(version), version)


@pytest.mark.anyio
async def test_a_new_version_is_taken_up_by_a_reload(tmp_path: Path) -> None:
    folders(tmp_path / "m", "3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"mediapipe_config_list": [{"name": "m"}]}))
    async with serving(source=path) as served:
        (shown,) = (await config(served))["m"]["model_version_status"]
        assert (shown["version"], shown["state"]) == ("3", "AVAILABLE")
        folders(tmp_path / "m", "4")
        code, statuses = await reload(served)
        assert (code, statuses["m"]["model_version_status"][0]["version"]) == (201, "4")
        assert (await served.client.get("/v2/models/m")).json()["versions"] == ["4"]
        assert await reload(served) == (200, statuses)
