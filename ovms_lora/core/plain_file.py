"""Reading a file that may be anything by now: a folder, a pipe that never ends, or gone.

Owns the bound on its size, and that opening it never waits.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ovms_lora.core.errors import ConfigUnreadableError

_LARGEST = 16 << 20
_HINT = "give --config_path an existing file"


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ConfigUnreadableError when it cannot be read, is no plain file or too large."""
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigUnreadableError(f"cannot read {path}: it is not a plain file", hint=_HINT)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(_LARGEST + 1)
        finally:
            os.close(descriptor)
        if len(content) > _LARGEST:
            raise ConfigUnreadableError(f"cannot read {path}: it is larger than {_LARGEST} bytes", hint=_HINT)
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigUnreadableError(f"cannot read {path}: {error.strerror}", hint=_HINT) from error
    except UnicodeDecodeError as error:
        raise ConfigUnreadableError(f"cannot read {path}: {error}", hint="write it in UTF-8") from error
