"""The process's one OpenVINO Core, through which every graph is read and compiled, and what its errors mean."""

from __future__ import annotations

import re
from functools import cache

import openvino as ov

from ovms_lora.core.errors import EngineError, NoMemoryError

# How OpenVINO, its plugins and the allocator say that there is no memory; there is no class or code for it.
_NO_MEMORY = re.compile(
    r"bad[ _]?(?:array_new_length|alloc)|out[ _]of[ _](?:\w+[ _])?memory|allocat\w* (?:\w+ )?memory|not enough memory",
    re.I,
)


@cache
def openvino_core() -> ov.Core:
    """Return the Core that all models share; it lives as long as the process.

    OpenVINO's CPU device gives the thread that first uses a Core an alternative signal stack, and unmaps it with the
    last user of that Core, in whatever thread that is. A thread that is then sent a signal (Ctrl-C) dies of a
    segmentation fault. A Core that is never freed keeps the stack in place.
    """
    return ov.Core()


def device_error(error: RuntimeError | MemoryError, what: str) -> EngineError:
    """Return the typed error for one that OpenVINO has raised in `what`.

    What OpenVINO says stays the cause, for the log: it names files and addresses, which are not for clients.
    """
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return NoMemoryError(f"no memory for {what}")
    return EngineError(f"the device failed in {what}")
