"""Bounds of processor time that do not depend on what ran before."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave the garbage collector out: a run over what all tests have made takes half a second and more."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail when what is done within takes more of this thread's processor time."""
    with uncollected():
        begun = time.thread_time()
        yield
        spent = time.thread_time() - begun
    assert spent < seconds, f"{spent:.3f} s of processor time, at most {seconds} s"
