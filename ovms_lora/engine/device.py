"""The process's one OpenVINO Core, through which every graph is read and compiled."""

from __future__ import annotations

from functools import cache

import openvino as ov


@cache
def openvino_core() -> ov.Core:
    """Return the Core that all models share; it lives as long as the process.

    OpenVINO's CPU device gives the thread that first uses a Core an alternative signal stack, and unmaps it with the
    last user of that Core, in whatever thread that is. A thread that is then sent a signal (Ctrl-C) dies of a
    segmentation fault. A Core that is never freed keeps the stack in place.
    """
    return ov.Core()
