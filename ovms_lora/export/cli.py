"""`export_model.py` and `ovms-lora export`: from arguments to an exit code.

Owns: what is printed where, signals, and the exit codes: 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated.
Does not know: the flags, or the work.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

from ovms_lora.core.errors import ExportError, OvmsLoraError, UsageError

_SPACE: Final = "free some space, or choose another --model_repository_path"
_HINTS: Final = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: "choose another --model_repository_path",
    errno.EACCES: "check who may write there",
    errno.EPERM: "check who may write there",
}


def main(argv: Sequence[str] | None = None, *, prog: str = "export_model.py") -> int:
    """Run one export and return the exit code; the folder's path goes to stdout, all else to stderr."""
    # OpenVINO's converter and nncf report their use to a server, unless they believe that they run in CI.
    os.environ.update(CI="true", NNCF_CI="true", HF_HUB_DISABLE_TELEMETRY="1")
    words = sys.argv[1:] if argv is None else argv
    verbose = "--verbose" in words
    with _signals() as caught:
        try:
            _export(words, prog)
        except KeyboardInterrupt:
            return _stopped(caught)
        except OvmsLoraError as error:
            return _stopped(caught) if caught else _report(error, verbose=verbose)
        except (OSError, MemoryError) as error:
            return _report(_refused_by_system(error), verbose=verbose)
    return 0


def _export(words: Sequence[str], prog: str) -> None:
    from ovms_lora.export.arguments import parse_request

    asked = parse_request(words, prog)
    # Below the parsing, so that --help and mistyped flags are answered at once.
    from ovms_lora.export.dry_run import dry_run
    from ovms_lora.export.progress import ExportProgress
    from ovms_lora.export.text_generation import export_text_generation

    with ExportProgress(verbose=asked.verbose) as progress:
        lines = dry_run(asked.request, progress) if asked.dry_run else [export_text_generation(asked.request, progress)]
        for line in lines:
            print(line)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt within, so that staging is removed; yields those that came.

    The list matters because a library may catch the exception and raise one of its own.
    """
    caught: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(caught: list[int]) -> int:
    print("stopped: nothing was exported", file=sys.stderr)
    return 128 + (caught[0] if caught else signal.SIGINT)


def _report(error: OvmsLoraError, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"error: {error.message}", file=sys.stderr)
    print(f"hint: {error.hint or 'nothing was exported; --verbose says where it ended'}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _refused_by_system(error: OSError | MemoryError) -> ExportError:
    """Put what the operating system refuses into one line."""
    if isinstance(error, MemoryError):
        return ExportError("not enough memory", hint="a smaller model, or a machine with more memory, is needed")
    where = f": {error.filename}" if error.filename else ""
    return ExportError(f"{error.strerror or error}{where}", hint=_HINTS.get(error.errno or 0, "nothing was exported"))
