"""The JSON that tells of the server and the states of its models, as types, for the OpenAPI document.

Owns what clients may rely on; `config_routes` and `health` write it.
"""

from __future__ import annotations

from typing import Any, Literal

# pydantic reads typing's own TypedDict only from Python 3.12 on.
from typing_extensions import TypedDict


class StatusDetail(TypedDict):
    """`OK`, or why a model cannot be loaded."""

    error_code: str
    error_message: str


class VersionStatus(TypedDict):
    """The state of a model's one version."""

    version: Literal["1"]
    state: Literal["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]
    status: StatusDetail


class ModelStatus(TypedDict):
    """The state of a model, as OVMS tells it."""

    model_version_status: list[VersionStatus]


Statuses = dict[str, ModelStatus]


class ServerMetadata(TypedDict):
    """What server this is."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(TypedDict):
    """KServe's description of a model; texts go through `/v3` and `/v1`, so it has no tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Any]
    outputs: list[Any]
