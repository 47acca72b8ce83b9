"""What a user sees while an export takes long: one line per step, on stderr.

Owns: the steps' lines and bars, and the silence of the libraries that do the work.
Does not know: what the steps do.
"""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

_WORTH_A_LINE: Final = 0.5  # seconds


class ExportProgress:
    """Reports steps: live bars on a terminal, a line at the start and the end of each elsewhere.

    With `verbose` the libraries may speak too; else what they print, warn and log is dropped.
    """

    def __init__(self, *, stream: TextIO | None = None, verbose: bool = False) -> None:
        # Bound now: rich would look sys.stderr up at each write, and find the one that silence() puts there.
        stream = stream or sys.stderr
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._verbose = verbose
        self._live: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._verbose:
            columns = (
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description:<9}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self._live = Progress(*columns, console=self._console, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, message: str) -> None:
        """Print one line between the steps."""
        self._console.print(message)

    @contextmanager
    def step(self, name: str, detail: str, *, total: int | None = None) -> Iterator[Step]:
        """Report one step; `total` is how much `advance` will count up, None where that is not known."""
        started = time.monotonic()
        task = None
        if self._live is None:
            self.note(f"{name}: {detail}")
        else:
            task = self._live.add_task(name, total=total, detail=detail)
        yield Step(self._live, task)
        if self._live is None:
            if (seconds := time.monotonic() - started) >= _WORTH_A_LINE:
                self.note(f"{name}: done in {seconds:.1f} s")
        elif task is not None:
            done = total if total is not None else 1
            self._live.update(task, total=done, completed=done)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Keep the libraries quiet within; they warn about each other, which tells a user nothing."""
        if self._verbose:
            with nullcontext():
                yield
            return
        sink = _Sink()
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield


class Step:
    """A running step."""

    def __init__(self, live: Progress | None, task: TaskID | None) -> None:
        self._live = live
        self._task = task

    def advance(self, amount: int) -> None:
        """Count `amount` more of the step's total as done."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, advance=amount)


class _Sink(io.TextIOBase):
    """A stream that forgets. Never closed: log handlers made inside silence() keep it for the process's life."""

    def write(self, text: str) -> int:
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False
