import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.config import CompositeComponent, CompositeEntry, read_server_config
from ovms_lora.core.errors import ConfigError
from ovms_lora.export.config_file import Registration, check_registration, register


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "config.json"


def entries(config: Path) -> list[dict[str, Any]]:
    return [item["config"] for item in json.loads(config.read_text())["model_config_list"]]


def model(config: Path, name: str = "m") -> Registration:
    return Registration(name, config.parent.parent / "models" / name)


def test_a_missing_file_is_made_with_paths_relative_to_it(config: Path) -> None:
    assert register(config, model(config, "org/m"))
    assert entries(config) == [{"name": "org/m", "base_path": "../models/org/m"}]
    assert config.stat().st_mode & 0o777 == 0o644


def test_other_entries_and_unknown_keys_stay_as_they_are(config: Path) -> None:
    config.parent.mkdir()
    other = {"name": "other", "base_path": "/x", "nireq": 4, "plugin_config": {"A": [1.5, None]}}
    mine = {"name": "m", "base_path": "old", "target_device": "GPU"}
    before = {"monitoring": {"metrics": True}, "model_config_list": [{"config": other}, {"config": mine, "k": 1}]}
    config.write_text(json.dumps(before))
    register(config, model(config))
    after = json.loads(config.read_text())
    mine["base_path"] = "../models/m"
    assert after == before
    assert list(after) == ["monitoring", "model_config_list"]


def test_registering_twice_changes_nothing(config: Path) -> None:
    assert register(config, model(config))
    stamp = config.stat()
    assert not register(config, model(config))
    assert config.stat() == stamp


def test_adapters_and_composites_replace_those_of_their_alias(config: Path, tmp_path: Path) -> None:
    mix = CompositeEntry(alias="mix", components=[CompositeComponent(adapter_alias="a", alpha=0.5)])
    adapters = (("a", tmp_path / "loras" / "a", 1.0), ("b", tmp_path / "loras" / "b", 2.0))
    register(config, Registration("m", tmp_path / "m", adapters, (mix,)))
    register(config, Registration("m", tmp_path / "m", (("a", tmp_path / "elsewhere", 3.0),), max_lora_rank=128))
    (entry,) = read_server_config(config).models
    assert [(a.alias, a.path, a.alpha) for a in entry.lora_adapters] == [
        ("a", "../elsewhere", 3.0),
        ("b", "../loras/b", 2.0),
    ]
    assert [composite.alias for composite in entry.composite_lora_adapters] == ["mix"]
    assert entry.lora_options is not None and entry.lora_options.max_lora_rank == 128
    with pytest.raises(ConfigError, match="rank 200, and lora_options of 'm' allows 128"):
        register(config, Registration("m", tmp_path / "m", max_lora_rank=200))


def test_an_alias_that_is_a_models_name_is_refused_before_it_is_written(config: Path, tmp_path: Path) -> None:
    register(config, model(config, "sql"))
    before = config.read_text()
    clash = Registration("m", tmp_path / "m", (("sql", tmp_path / "sql", 1.0),))
    for action in (check_registration, register):
        with pytest.raises(ConfigError, match="'sql' is used twice"):
            action(config, clash)
    assert config.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_config_list": [', "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "has no list 'model_config_list'"),
        ('{"model_config_list": {}}', "has no list 'model_config_list'"),
        ('{"model_config_list": [{}]}', "every item"),
        ('{"model_config_list": [{"config": "m"}]}', "every item"),
    ],
)
def test_a_broken_file_is_refused_and_kept(config: Path, text: str, message: str) -> None:
    config.parent.mkdir()
    config.write_bytes(text.encode("latin-1"))
    for action in (check_registration, register):
        with pytest.raises(ConfigError, match=message):
            action(config, model(config))
    assert config.read_bytes() == text.encode("latin-1")


def test_a_folder_in_its_place_is_refused(config: Path) -> None:
    config.mkdir(parents=True)
    with pytest.raises(ConfigError, match="Is a directory"):
        check_registration(config, model(config))


def test_a_link_stays_a_link_and_the_mode_stays(config: Path, tmp_path: Path) -> None:
    config.parent.mkdir()
    real = tmp_path / "real.json"
    real.write_text("{}")
    real.chmod(0o600)
    config.symlink_to(real)
    register(config, model(config))
    assert config.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert entries(real) == [{"name": "m", "base_path": "models/m"}]


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    register(config, model(config, "first"))
    before = config.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="No space left"):
        register(config, model(config, "second"))
    assert config.read_text() == before
    assert [path.name for path in config.parent.iterdir() if path.suffix != ".lock"] == ["config.json"]


def test_what_a_killed_write_left_is_no_hindrance(config: Path) -> None:
    config.parent.mkdir()
    (config.parent / ".config.json.new").write_text("half a docu")
    register(config, model(config))
    assert entries(config)[0]["name"] == "m"
    assert not (config.parent / ".config.json.new").exists()


def test_many_exports_at_once_lose_no_entry(config: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ovms_lora.export.config_file import *\n"
        "register(Path(sys.argv[1]), Registration(sys.argv[2], Path('models', sys.argv[2])))"
    )
    names = [f"m{number}" for number in range(8)]
    running = [subprocess.Popen([sys.executable, "-c", code, str(config), name]) for name in names]
    assert [process.wait() for process in running] == [0] * len(names)
    assert sorted(entry["name"] for entry in entries(config)) == names
