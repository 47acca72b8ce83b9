"""`ovms-lora list` and `ovms-lora remove`: what is there, and how it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovms_lora import cli
from ovms_lora.core.config import read_server_config
from ovms_lora.export.config_file import Registration, register
from ovms_lora.export.manifest import MANIFEST_NAME, Drift, FileRecord, Manifest, Recipe, SourceRecord, write_manifest
from tests.export.conftest import Sources, Workshop

DRIFT = Drift(mean_kl=0.0123, max_kl=0.5, top1_agreement=0.97, positions=256)


def put(workshop: Workshop, name: str, *, drift: Drift | None = None) -> Path:
    """Make an exported folder of two files, named in the configuration file."""
    folder = workshop.repository / name
    folder.mkdir(parents=True)
    files = {}
    for file in ("openvino_model.xml", "openvino_model.bin"):
        (folder / file).write_text("x" * 500_000)
        files[file] = FileRecord(size=500_000, sha256="")
    recipe = Recipe(source=SourceRecord(source="/far/away/base", digest="d"), weight_format="int8")
    write_manifest(folder, Manifest(name=name, recipe=recipe, verified=drift, versions={}, files=files))
    register(workshop.config, Registration(name, folder))
    return folder


def run(workshop: Workshop, command: str, *words: str) -> int:
    places = ["--model_repository_path", str(workshop.repository), "--config_file_path", str(workshop.config)]
    return cli.main([command, *words, *places])


def contents(workshop: Workshop) -> dict[Path, bytes]:
    """Return all files but for locks."""
    files = (path for path in workshop.folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


def test_a_list_has_a_row_for_each_export(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    put(workshop, "base", drift=DRIFT)
    put(workshop, "org/other")
    register(workshop.config, Registration("base", workshop.repository / "base", (("sql", Path("loras/sql"), 1.0),)))
    assert run(workshop, "list") == 0
    head, base, other = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["NAME", "FORMAT", "SIZE", "SOURCE", "MERGED", "RUNTIME", "DRIFT", "STATUS"]
    assert base == ["base", "int8", "1.0", "MB", "base", "-", "sql", "0.012", "ok"]
    assert other == ["org/other", "int8", "1.0", "MB", "base", "-", "-", "-", "ok"]


def test_the_list_as_json_has_all_that_is_known(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    put(workshop, "base", drift=DRIFT)
    assert run(workshop, "list", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["source"] == {"source": "/far/away/base", "digest": "d"}
    assert (row["name"], row["weight_format"], row["size"], row["status"]) == ("base", "int8", 1_000_000, "ok")
    assert row["verified"] == DRIFT.model_dump()
    assert row["adapters"] == row["lora_adapters"] == []


def test_a_real_export_with_adapters_is_listed(
    exported: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(exported, "list") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"base", "small", "rounded", "merged"} <= rows.keys()
    assert "sql=0.5, tools=1" in rows["merged"]
    assert "sql, tools, mix" in rows["base"]


def test_what_is_wrong_is_said_in_the_list(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    (put(workshop, "cut") / "openvino_model.bin").write_text("x")
    put(workshop, "unknown")
    workshop.config.write_text('{"model_config_list": []}')
    assert run(workshop, "list") == 0
    _, cut, unknown = capsys.readouterr().out.splitlines()
    assert cut.endswith("damaged: openvino_model.bin has 1 bytes, not 500000")
    assert unknown.endswith("not in config.json")


def test_a_repository_that_is_not_there_is_an_error(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(workshop, "list") == 1
    assert "there is no repository" in capsys.readouterr().err
    workshop.repository.mkdir()
    assert run(workshop, "list") == 0


def test_a_removed_model_leaves_the_configuration_and_the_disk(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    put(workshop, "org/gone")
    put(workshop, "org/kept")
    adapter = workshop.repository / "loras" / "sql"
    adapter.mkdir(parents=True)
    register(workshop.config, Registration("org/gone", workshop.repository / "org" / "gone", (("sql", adapter, 1.0),)))
    assert run(workshop, "remove", "org/gone") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{workshop.config} no longer names org/gone",
        f"removed {workshop.repository / 'org' / 'gone'}",
        "left models/loras/sql: adapters may serve other models too",
    ]
    assert [model.name for model in read_server_config(workshop.config).models] == ["org/kept"]
    assert not (workshop.repository / "org" / "gone").exists()
    assert (workshop.repository / "org" / "kept").is_dir() and adapter.is_dir()
    assert run(workshop, "remove", "org/kept") == 0
    assert not (workshop.repository / "org").exists()
    assert workshop.leftovers == []
    assert read_server_config(workshop.config).models == ()


def test_a_model_that_no_configuration_names_is_removed_too(workshop: Workshop) -> None:
    put(workshop, "m")
    workshop.config.unlink()
    assert run(workshop, "remove", "m") == 0
    assert not (workshop.repository / "m").exists()
    assert not workshop.config.exists()


@pytest.mark.parametrize("case", ["someone's", "symlink", "moved", "note", "inner", "elsewhere"])
def test_what_is_not_ours_is_refused_and_stays(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    folder = put(workshop, "m")
    expected = {
        "someone's": "was not written by this exporter",
        "symlink": "there is no model 'm'",
        "moved": "is an export of 'm'",
        "note": "thesis.txt is not part of the export",
        "inner": "is not part of the export",
        "elsewhere": "is " + str(tmp_path / "other"),
    }
    name = "m"
    if case == "someone's":
        (folder / MANIFEST_NAME).unlink()
    elif case == "symlink":
        folder.rename(tmp_path / "real")
        folder.symlink_to(tmp_path / "real")
    elif case == "moved":
        folder.rename(workshop.repository / "n")
        name = "n"
    elif case == "note":
        (folder / "thesis.txt").touch()
    elif case == "inner":
        put(workshop, "m/inner")
    else:
        workshop.config.unlink()
        register(workshop.config, Registration("m", tmp_path / "other"))
    before = contents(workshop)
    assert run(workshop, "remove", name) == 1
    assert expected[case] in capsys.readouterr().err
    assert contents(workshop) == before


@pytest.mark.parametrize("name", ["../m", "/etc", "a/../m", "$(touch x)", "", "."])
def test_names_that_look_like_paths_or_shell_are_refused(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    put(workshop, "m")
    assert run(workshop, "remove", name) == 2
    assert "is not valid" in capsys.readouterr().err
    assert (workshop.repository / "m").is_dir()


def test_a_model_that_is_being_exported_is_not_removed(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    from ovms_lora.export.publish import locked

    put(workshop, "m")
    with locked(workshop.repository, "m"):
        assert run(workshop, "remove", "m") == 1
    assert "another export of 'm' is running" in capsys.readouterr().err
