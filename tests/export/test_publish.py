"""Publishing: a crash before any single operation on the disk leaves the old folder or the new one, whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovms_lora.core.errors import ExportError
from ovms_lora.export.publish import HIDDEN, locked, publish, staging

FILES = ("a.bin", "b.bin", "sub/c.bin")

# Publishes "new" in the place of "old" and dies, as if by SIGKILL, before operation number N on the disk.
CRASH = """
import os, sys
from pathlib import Path
from ovms_lora.export.publish import locked, publish, staging

repository, name, fatal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0

def operation():
    global count
    count += 1
    if count == fatal:
        os._exit(9)

def audit(event, arguments):
    if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}:
        operation()
    if event == "open" and ".bin" in str(arguments[0]) and arguments[1] != "r":
        operation()

fsync = os.fsync
os.fsync = lambda descriptor: (operation(), fsync(descriptor))
sys.addaudithook(audit)
with locked(repository, name), staging(repository, name) as folder:
    model = folder / "model"
    (model / "sub").mkdir(parents=True)
    for file in ("a.bin", "b.bin", "sub/c.bin"):
        (model / file).write_text("new")
    publish(model, repository, name)
"""


def put(repository: Path, name: str, content: str) -> None:
    with locked(repository, name), staging(repository, name) as folder:
        write(folder / "model", content)
        publish(folder / "model", repository, name)


def write(folder: Path, content: str) -> None:
    (folder / "sub").mkdir(parents=True)
    for file in FILES:
        (folder / file).write_text(content)


def content(folder: Path) -> str | None:
    """The content that all files share, None for no folder."""
    if not folder.exists():
        return None
    (one,) = {(folder / file).read_text() for file in FILES}
    return one


def hidden(repository: Path) -> list[str]:
    return [path.name for path in (repository / HIDDEN).iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_before_any_operation_leaves_old_or_new_and_the_next_export_clears_up(
    tmp_path: Path, before: str | None
) -> None:
    seen = set()
    for fatal in range(1, 100):
        repository = tmp_path / str(fatal)
        repository.mkdir()
        if before:
            put(repository, "org/name", before)
        command = [sys.executable, "-c", CRASH, str(repository), "org/name", str(fatal)]
        code = subprocess.run(command, check=False).returncode
        assert code in (0, 9)
        visible = content(repository / "org" / "name")
        with locked(repository, "another"):  # any export clears up, not only one of the same name
            recovered = content(repository / "org" / "name")
        assert visible in (before, "new", None)
        assert recovered in (before, "new")
        assert recovered == visible or visible is None
        assert hidden(repository) == []
        put(repository, "org/name", "newest")
        assert content(repository / "org" / "name") == "newest"
        seen.add(recovered)
        if code == 0:
            break
    assert code == 0 and fatal > 15
    assert seen == {before, "new"}


def test_an_interrupt_between_the_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "name", "old")
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, "name", "new")
    assert content(tmp_path / "name") == "old"
    assert hidden(tmp_path) == []


def test_a_full_disk_while_syncing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path, "name", "new")
    assert not (tmp_path / "name").exists()
    assert hidden(tmp_path) == []


def test_two_exports_of_one_name_at_once_are_refused_and_of_two_names_are_not(tmp_path: Path) -> None:
    with locked(tmp_path, "name"), staging(tmp_path, "name") as folder:
        with pytest.raises(ExportError, match="another export of 'name' is running"), locked(tmp_path, "name"):
            raise AssertionError("locked twice")
        put(tmp_path, "other", "new")
        assert folder.is_dir()  # the other export did not take it for a leftover
    put(tmp_path, "name", "new")


def test_names_with_a_slash_do_not_share_hidden_folders_with_others(tmp_path: Path) -> None:
    with locked(tmp_path, "a/b"), staging(tmp_path, "a/b"), locked(tmp_path, "a-b"), locked(tmp_path, "a.b"):
        put(tmp_path, "a_b", "new")
        assert len(hidden(tmp_path)) == 1


def test_hidden_things_that_are_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / HIDDEN).mkdir()
    (tmp_path / HIDDEN / "notes.txt").touch()
    put(tmp_path, "name", "new")
    assert hidden(tmp_path) == ["notes.txt"]
