"""The OpenAPI document of all routes: what FastAPI collects from them, with what holds for several of them.

Owns keys, and the types that routes name; a route describes itself with `route_docs`.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from ovms_lora.server import answer_types
from ovms_lora.server.auth import ADMIN_PATHS
from ovms_lora.server.bounds import with_limits
from ovms_lora.server.health import PROBES
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.route_docs import REF

# What routes describe by name.
_NAMED = (
    answer_types.OvmsError,
    answer_types.OpenAIError,
    answer_types.CompletionChunkV3,
    answer_types.CompletionChunkV1,
    answer_types.ChatChunkV3,
    answer_types.ChatChunkV1,
)
_KEY = "ApiKey"


def completed(document: dict[str, Any], options: ServerOptions) -> dict[str, Any]:
    """Return FastAPI's document with the types it does not know, with keys, and without what FastAPI only supposes."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(_named_schemas())
    document["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _drop_supposed_validation(operation["responses"])
            if _wants_key(path, options):
                operation["security"] = [{_KEY: []}]
    described: dict[str, Any] = with_limits(document, options.limits)
    return described


def _named_schemas() -> dict[str, Any]:
    wanted = [(kind, "serialization", TypeAdapter(kind)) for kind in _NAMED]
    _, schemas = TypeAdapter.json_schemas(wanted, ref_template=REF)  # type: ignore[arg-type]
    definitions: dict[str, Any] = schemas["$defs"]
    return definitions


def _drop_supposed_validation(answers: dict[str, Any]) -> None:
    """Drop FastAPI's 422 for parameters: every path is a name of some model, or 404."""
    schema = answers.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if schema.get("$ref", "").endswith("/HTTPValidationError"):
        del answers["422"]


def _wants_key(path: str, options: ServerOptions) -> bool:
    if path in PROBES:
        return False
    return bool(options.api_keys) or (path in ADMIN_PATHS and bool(options.admin_keys))
