"""The Hugging Face hub: fetching the files of a repository, or only asking how large they are.

Owns: the calls, and what their failures mean to a user.
Does not know: which files make a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ovms_lora.core.errors import ExportError

_NOT_WANTED: Final = ("*/*", "consolidated*")


@dataclass(frozen=True, slots=True)
class ToFetch:
    """What fetching would take: files that are not in the cache, and their bytes."""

    files: int
    size: int


def fetch(hub_id: str, what: str, patterns: tuple[str, ...]) -> Path:
    """Fetch the files that match `patterns` into the hub's cache and return their folder. Raises ExportError."""
    return Path(_snapshot(hub_id, what, patterns))


def ask(hub_id: str, what: str, patterns: tuple[str, ...]) -> ToFetch:
    """Ask what fetching would take, and fetch nothing. Raises ExportError."""
    try:
        files = _snapshot(hub_id, what, patterns, dry_run=True)
    except ExportError:
        # Without a network an export takes what is in the cache, if it is there.
        _snapshot(hub_id, what, patterns, cached=True)
        return ToFetch(0, 0)
    missing = [file for file in files if file.will_download]
    return ToFetch(len(missing), sum(file.file_size for file in missing))


def _snapshot(hub_id: str, what: str, patterns: tuple[str, ...], *, dry_run: bool = False, cached: bool = False) -> Any:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    expected = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, DryRunError)
    try:
        return snapshot_download(
            hub_id,
            allow_patterns=list(patterns),
            ignore_patterns=list(_NOT_WANTED),
            dry_run=dry_run,
            local_files_only=cached,
        )
    except (*expected, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"no folder {hub_id}, and no such {what} from the hub: {reason}", hint="check the name and the network"
        ) from error
