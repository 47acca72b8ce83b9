"""Files are opened once, by descriptor, and only if they are plain files of the folder."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.adapters.adapter import Adapter, inspect_adapter, load_adapter
from ovms_lora.adapters.safetensors_file import SafetensorsFile
from ovms_lora.core.errors import AdapterError, AdapterNotFoundError, UnavailableError
from tests.adapters.adapter_files import tiny_base, write_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def load(folder: Path) -> Adapter:
    return load_adapter(folder, tiny_base(), max_lora_rank=64, lora_dtype=np.float32)


def refusal(folder: Path) -> AdapterError:
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(AdapterError) as caught:
        load(folder)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    return caught.value


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def _outside(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    shutil.copy(path.with_name(f"{path.name}.good"), outside)
    path.symlink_to(outside)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _itself(path: Path) -> None:
    path.symlink_to(path.name)


def _unreadable(path: Path) -> None:
    path.touch(mode=0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")


REPLACEMENTS: list[Callable[[Path], None]] = [
    _fifo,
    _socket,
    _outside,
    _device,
    _dangling,
    _itself,
    Path.mkdir,
    _unreadable,
]


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize(("name", "code"), [(WEIGHTS, "adapter_format"), (CONFIG, "adapter_config_invalid")])
def test_what_is_no_plain_file_is_refused(
    name: str, code: str, replace: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / name).rename(folder / f"{name}.good")
    replace(folder / name)
    error = refusal(folder)
    assert error.code == code
    assert name in error.message
    assert str(tmp_path) not in error.message


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / WEIGHTS).unlink()
    try:
        os.mknod(folder / WEIGHTS, 0o020666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no right to make a device here")
    assert refusal(folder).code == "adapter_format"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_adapter(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert load(tmp_path / "current").digest == load(tmp_path / "v1").digest


def test_no_folder_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file", tmp_path / "file" / "x", Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(AdapterNotFoundError, match="No adapter found for "):
            load(path)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / CONFIG).unlink()
    assert refusal(tmp_path).code == "adapter_config_missing"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / WEIGHTS).unlink()
    assert refusal(tmp_path).code == "adapter_incomplete"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.PT", "pytorch_lora.pth", "a.pkl"])
def test_a_pickle_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / WEIGHTS).rename(folder / name)
    error = refusal(folder)
    assert error.code == "adapter_format"
    assert name in error.message


def test_a_pickle_beside_the_weights_is_not_looked_at(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert load(tmp_path).layers


def _append(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")


def _cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 900)


def _overwrite(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    os.utime(folder / WEIGHTS, ns=(1, 1))  # a clock that was set back hides nothing


def _replace(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "new")
    (folder / "new").rename(folder / WEIGHTS)


def _delete(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _other_configuration(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("4", "8"))


@pytest.mark.parametrize("change", [_append, _cut, _overwrite, _replace, _delete, _other_configuration])
def test_what_is_rewritten_while_loading_is_refused(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path)
    for name in (WEIGHTS, CONFIG):
        os.utime(folder / name, ns=(10**18, 10**18))
    read, reads = SafetensorsFile.read, []

    def read_and_change(self: SafetensorsFile, info: object) -> object:
        reads.append(info)
        if len(reads) == 2:
            change(folder)
        return read(self, info)  # type: ignore[arg-type]

    monkeypatch.setattr(SafetensorsFile, "read", read_and_change)
    assert refusal(folder).code == "adapter_truncated"
    assert len(reads) >= 2


def test_a_disk_that_fails_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    folder = write_adapter(tmp_path)
    monkeypatch.setattr(os, "preadv", broken)
    assert refusal(folder).code == "adapter_truncated"


@pytest.mark.parametrize("folder_too", [True, False])
def test_too_many_open_files_is_not_the_adapters_fault(
    folder_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def full(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if folder_too or path == WEIGHTS:
            raise OSError(errno.EMFILE, "Too many open files")
        return really_open(path, flags, dir_fd=dir_fd)

    folder = write_adapter(tmp_path)
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(UnavailableError, match="Too many open files"):
        load(folder)


def test_nothing_stays_open(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    load(folder)
    inspect_adapter(folder)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
