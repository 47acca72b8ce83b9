"""BucketUrl: the address of a folder in an object store, as config.json and the command line give it.

Owns which stores there are, which library reads each, and that an address never carries credentials. No I/O.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from ovms_lora.core.errors import ConfigError

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "abfss": "adlfs"}

_PREFIX = r"(?:/[^\s/?#*\[\]{}\\:@%]+)*"
_SHAPES = {
    "s3": re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{1,62}}{_PREFIX}"),
    "gs": re.compile(rf"[a-z0-9][a-z0-9._-]{{1,221}}{_PREFIX}"),
    "abfss": re.compile(rf"[a-z0-9-]{{3,63}}@[a-z0-9]{{3,24}}\.dfs\.core\.windows\.net{_PREFIX}"),
}
_EXAMPLES = {
    "s3": "s3://bucket/loras",
    "gs": "gs://bucket/loras",
    "abfss": "abfss://container@account.dfs.core.windows.net/loras",
}


@dataclass(frozen=True, slots=True)
class BucketUrl:
    """A folder in a bucket; `location` is what follows `scheme://`, without a slash at the end."""

    scheme: str
    location: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.location}"

    @classmethod
    def parse(cls, text: str) -> BucketUrl:
        """Return the address in a text. Raises ConfigError, which never repeats the text: it may hold a secret."""
        scheme, _, location = text.partition("://")
        if scheme not in LIBRARIES:
            kind = f"{scheme}://" if scheme.isalnum() else "this"
            raise ConfigError(
                f"adapters are not loaded from {kind}", hint=f"give a local folder or {', '.join(_EXAMPLES.values())}"
            )
        location = location.rstrip("/")
        _refuse_credentials(scheme, location)
        parts = location.split("/")[1:]
        if not _SHAPES[scheme].fullmatch(location) or any(part in (".", "..") for part in parts):
            raise ConfigError(f"the address after {scheme}:// is not one of a bucket", hint=f"like {_EXAMPLES[scheme]}")
        return cls(scheme, location)

    def split(self) -> tuple[BucketUrl, str]:
        """Return the address above, and the last name. Raises ConfigError for a bucket itself."""
        above, slash, name = self.location.rpartition("/")
        if not slash:
            raise ConfigError("the address is one of a bucket, not of an adapter", hint=f"like {self}/sql")
        return BucketUrl(self.scheme, above), name

    def check_library(self) -> None:
        """Raise ConfigError unless the library for this store is installed; loads nothing."""
        for library in ("fsspec", LIBRARIES[self.scheme]):
            if importlib.util.find_spec(library) is None:
                raise ConfigError(
                    f"reading {self.scheme}:// needs the package {library}", hint='pip install "ovms-lora[ray]"'
                )


def _refuse_credentials(scheme: str, location: str) -> None:
    user, at, _ = location.partition("@")
    carries_user = bool(at) and (scheme != "abfss" or ":" in user)
    if carries_user or "?" in location:
        raise ConfigError(
            f"the address after {scheme}:// carries credentials or parameters",
            hint="give credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
