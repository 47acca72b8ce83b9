"""Where adapters lie: in folders, or as copies of what a bucket holds.

    host memory (`store`) ◄── a folder on the disk
                          ◄── a copy in the local cache (`disk_cache`) ◄── a bucket (`bucket`)

Owns what these have in common: a place that can be opened as a folder, and a loading path that is one or the other.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

from ovms_lora.adapters.bucket_source import StoredAdapter
from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.peft_config import CONFIG_NAME
from ovms_lora.core.names import is_alias

AdapterPlace = Path | StoredAdapter
LoadingPath = Path | BucketUrl


def opened(place: AdapterPlace) -> AbstractContextManager[Path]:
    """Return a context that gives the folder of an adapter. It raises UnavailableError for a copy that is gone."""
    return contextlib.nullcontext(place) if isinstance(place, Path) else place.opened()


def loading_path(text: str, root: Path) -> LoadingPath:
    """Return the loading path in a text: a bucket's address, or a folder relative to `root`. Raises ConfigError."""
    if "://" not in text:
        return (root / text).absolute()
    url = BucketUrl.parse(text)
    url.check_library()
    return url


def adapter_in(folder: Path, alias: str) -> Path | None:
    """Return the folder of an adapter in a loading path, None where there is none or the name is no alias."""
    return folder / alias if is_alias(alias) and (folder / alias / CONFIG_NAME).is_file() else None


def adapters_in(folder: Path) -> list[str]:
    """Return the names of the adapters in a loading path; none when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if adapter_in(folder, entry.name))
    except OSError:
        return []
