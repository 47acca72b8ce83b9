"""StrictModel: the base of what is read from configuration files, and what its checks raise.

A check that fails within pydantic has to say where; `refusal` and `checked` keep message, hint and place together
until `config` makes a ConfigError of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from ovms_lora.core.errors import ConfigError


class StrictModel(BaseModel):
    """Frozen, and without keys that are not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def refusal(message: str, *, hint: str, at: str = "") -> PydanticCustomError:
    """Return what a validator raises; `at` is the place below the value that is validated, as `key.0.key`."""
    return PydanticCustomError("refused", "{message}", {"message": message, "hint": hint, "at": at})


def checked(check: Callable[[str], str]) -> AfterValidator:
    """Return a validator of a check that raises ConfigError."""

    def validate(value: str) -> str:
        try:
            return check(value)
        except ConfigError as error:
            raise refusal(error.message, hint=error.hint or "") from error

    return AfterValidator(validate)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON document, for `object_pairs_hook`. Raises ValueError when a key stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!a} stands twice in one object")
    return result


def _check_path(path: str) -> str:
    if not path or "\0" in path or not path.isprintable():
        raise ConfigError(f"{path!a} is not a path", hint="give a path, absolute or relative to the file's folder")
    if "://" in path:
        raise ConfigError(
            f"{path.partition('://')[0]}:// is not read from here", hint="copy the folder to a local one and name that"
        )
    return path


LocalPath = Annotated[str, checked(_check_path)]
