"""Dying at every boundary: a command runs once for each of its operations on the disk, and is killed before it.

`python -m tests.export.crashes FOLDER TEMPLATE COMMAND…` copies TEMPLATE to FOLDER/1, FOLDER/2 and so on, and runs the
command there in a fork that dies before its operation 1, 2 and so on, until one ends by itself. Conversion is left
out. Nothing goes by time.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ovms_lora import cli
from ovms_lora.export import convert, text_generation
from ovms_lora.export.plan import Plan
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.verify import Expected

_CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})
_KILLED = 9


def main(folder: Path, template: Path, command: list[str]) -> int:
    """Run the command until it survives; returns its exit code."""
    text_generation._convert = _convert
    convert.check_ir = lambda folder, *, module_names=True: None
    number, code = 0, _KILLED
    while code == _KILLED:
        number += 1
        place = folder / str(number)
        shutil.copytree(template, place)
        child = os.fork()
        if child == 0:
            os.chdir(place)
            _die_before(number)
            os._exit(cli.main(command))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code


def _convert(plan: Plan, source: Path, folder: Path, progress: ExportProgress) -> list[Expected]:
    for name in ("openvino_model.xml", "openvino_model.bin", "tokenizer.json"):
        (folder / name).write_text(f"{name} in {plan.weight_format}")
    return []


def _die_before(fatal: int) -> None:
    count = 0

    def operation() -> None:
        nonlocal count
        count += 1
        if count == fatal:
            os._exit(_KILLED)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in _CHANGES or (event == "open" and _writes(arguments[2])):
            operation()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        operation()
        fsync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    sys.addaudithook(audit)


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
