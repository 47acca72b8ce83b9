"""Whole commands killed before every operation on the disk, or refused by it, or met by another process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ovms_lora.core.config import read_server_config
from ovms_lora.export import text_generation
from ovms_lora.export.manifest import read_manifest
from ovms_lora.export.plan import Plan
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.publish import locked
from ovms_lora.export.verify import Expected
from tests.export.conftest import Fails, Sources, Workshop

ROOT = Path(__file__).parents[2]


def killed_everywhere(folder: Path, template: Path, *command: str) -> list[Workshop]:
    """Run a command that dies before its first operation, its second, …; returns what each left, the last whole."""
    program = [sys.executable, "-m", "tests.export.crashes", str(folder), str(template), *command]
    done = subprocess.run(program, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Workshop(path) for path in sorted(folder.iterdir(), key=lambda path: int(path.name))]


def served(workshop: Workshop) -> dict[str, str]:
    """Return what a server that starts now finds: model names and their weight formats, each checked to be whole."""
    found = {}
    for model in read_server_config(workshop.config).models if workshop.config.exists() else ():
        folder = workshop.folder / model.base_path
        manifest = read_manifest(folder)
        if manifest is not None:
            assert manifest.damage(folder) is None
            found[model.name] = manifest.recipe.weight_format
    return found


def export_command(sources: Sources, *flags: str) -> list[str]:
    return ["export", "text_generation", "--source_model", str(sources.base), "--weight-format", "fp32", *flags]


def test_a_killed_first_export_leaves_nothing_or_all_and_the_next_one_ends_it(
    tmp_path: Path, sources: Sources, quick: None
) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "runs").mkdir()
    runs = killed_everywhere(
        tmp_path / "runs", tmp_path / "template", *export_command(sources, "--config_file_path", "config.json")
    )
    assert len(runs) > 30
    assert [served(run) for run in (runs[0], runs[-1])] == [{}, {"tiny": "fp32"}]
    for run in runs:
        assert served(run) in ({}, {"tiny": "fp32"})
        assert run.models in ([], ["tiny"])
        assert run.export(sources.base, "--weight-format", "fp32") == 0
        assert (served(run), run.leftovers) == ({"tiny": "fp32"}, [])


def test_a_killed_overwrite_leaves_the_old_or_the_new(tmp_path: Path, sources: Sources, quick: None) -> None:
    template = Workshop(tmp_path / "template")
    template.folder.mkdir()
    (tmp_path / "runs").mkdir()
    assert template.export(sources.base, "--weight-format", "bf16") == 0
    runs = killed_everywhere(tmp_path / "runs", template.folder, *export_command(sources, "--overwrite_models"))
    states = [served(run).get("tiny") for run in runs]
    assert (states[0], states[-1]) == ("bf16", "fp32")
    # Between the two renames the place is empty: the server keeps what it has, the next export puts the old one back.
    assert states.count(None) <= 1
    for run, state in zip(runs, states, strict=True):
        with locked(run.repository, "another"):
            assert served(run).get("tiny") == (state or "bf16")
        assert run.leftovers == []
        assert run.export(sources.base, "--weight-format", "fp32", "--overwrite_models") == 0
        assert served(run) == {"tiny": "fp32"}


def test_a_killed_removal_is_undone_or_ended_by_the_same_command(tmp_path: Path, sources: Sources, quick: None) -> None:
    from ovms_lora import cli

    template = Workshop(tmp_path / "template")
    template.folder.mkdir()
    (tmp_path / "runs").mkdir()
    assert template.export(sources.base, "--model_name", "org/tiny") == 0
    assert template.export(sources.base, "--model_name", "kept") == 0
    runs = killed_everywhere(tmp_path / "runs", template.folder, "remove", "org/tiny")
    assert len(runs) > 5
    for run in runs:
        assert served(run) in ({"org/tiny": "int8", "kept": "int8"}, {"kept": "int8"})
        places = ["--model_repository_path", str(run.repository), "--config_file_path", str(run.config)]
        if (run.repository / "org" / "tiny").exists():
            assert cli.main(["remove", "org/tiny", *places]) == 0
        with locked(run.repository, "another"):
            assert run.leftovers == []
        assert served(run) == {"kept": "int8"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_sync_or_rename_leaves_nothing(
    tmp_path: Path, sources: Sources, quick: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The disk refuses operation 1, then 2, and so on, until an export meets no refusal."""
    fatal, refused = 0, True
    while refused:
        fatal += 1
        run = Workshop(tmp_path / str(fatal))
        run.folder.mkdir()
        with monkeypatch.context() as patched:
            count = refuse_operation(patched, fatal, code)
            refused = run.export(sources.base) == 1
        assert refused == (count() >= fatal)
        if refused:
            # After the rename into place the folder is whole, and the same export ends the registration.
            assert served(run) in ({}, {"tiny": "int8"})
            assert run.leftovers == []
        assert run.export(sources.base) == 0
        assert served(run) == {"tiny": "int8"}
    assert fatal > 10


def refuse_operation(patched: pytest.MonkeyPatch, fatal: int, code: int) -> Callable[[], int]:
    """Let fsync or rename number `fatal` fail; returns the counter of both."""
    done = 0

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            nonlocal done
            done += 1
            if done == fatal:
                raise OSError(code, os.strerror(code))
            return operation(*arguments)

        return run

    patched.setattr(os, "fsync", counted(os.fsync))
    patched.setattr(Path, "replace", counted(Path.replace))
    return lambda: done


def test_of_two_exports_of_one_name_at_once_one_is_refused_and_one_succeeds(
    workshop: Workshop, sources: Sources, quick: None, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    convert = text_generation._convert
    seen: list[str] = []

    def meanwhile(plan: Plan, source: Path, folder: Path, progress: ExportProgress) -> list[Expected]:
        if not seen:  # while the first holds the lock, a second process tries
            flags = ["--model_repository_path", str(workshop.repository), "--config_file_path", str(workshop.config)]
            command = [sys.executable, str(ROOT / "export_model.py"), *export_command(sources, *flags)[1:]]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            seen.append(done.stderr)
            assert done.returncode == 1
        return convert(plan, source, folder, progress)

    monkeypatch.setattr(text_generation, "_convert", meanwhile)
    assert workshop.export(sources.base) == 0
    assert "error: another export of 'tiny' is running" in seen[0]
    assert served(workshop) == {"tiny": "int8"}
    assert workshop.leftovers == []


def test_a_server_that_polls_during_exports_only_ever_sees_whole_models(
    workshop: Workshop, sources: Sources, quick: None
) -> None:
    wrong: list[Exception] = []
    seen: set[int] = set()
    ended = threading.Event()

    def poll() -> None:
        while not ended.is_set():
            try:
                models = read_server_config(workshop.config).models if workshop.config.exists() else ()
                for model in models:
                    manifest = read_manifest(workshop.folder / model.base_path)
                    assert manifest is not None and manifest.damage(workshop.folder / model.base_path) is None
                seen.add(len(models))
            except Exception as error:  # noqa: BLE001  # shown by the test itself
                wrong.append(error)

    server = threading.Thread(target=poll)
    server.start()
    try:
        for number in range(5):
            assert workshop.export(sources.base, "--model_name", f"m{number}") == 0
    finally:
        ended.set()
        server.join()
    assert wrong == []
    assert len(served(workshop)) == 5 and seen
