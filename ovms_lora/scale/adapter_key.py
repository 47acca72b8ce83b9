"""Which adapters a request names, as far as its place needs it; what is wrong with it, the replica says.

Owns the paths that use adapters, and the reading of `model`, `lora` and `lora_name`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ovms_lora.core.errors import MalformedBodyError
from ovms_lora.core.names import is_alias, split_model
from ovms_lora.scale.holdings import key_of
from ovms_lora.server.body import parse_object

_PATHS = re.compile(r"/v[13]/(chat/completions|completions|tokenize)|/v1/unload_lora_adapter")
_MOST = 16


def adapter_key(method: str, path: str, body: bytes) -> str:
    """Return the multiplexed model id of a request; empty where it may go anywhere.

    A base's name cannot be told from an alias here: the router knows the bases.
    """
    if method != "POST" or not _PATHS.fullmatch(path):
        return ""
    try:
        document = parse_object(body)
    except MalformedBodyError:
        return ""
    aliases = list(_named(document))
    # Other names are no adapter's, and need not be remembered.
    return key_of(aliases) if len(aliases) <= _MOST and all(map(is_alias, aliases)) else ""


def _named(document: Mapping[str, Any]) -> Iterator[str]:
    blend, unloaded = document.get("lora"), document.get("lora_name")
    if isinstance(unloaded, str):
        yield unloaded
    elif isinstance(blend, list) and blend:
        yield from (part["alias"] for part in blend if isinstance(part, dict) and isinstance(part.get("alias"), str))
    elif isinstance(model := document.get("model"), str):
        base, alias = split_model(model)
        yield base if alias is None else alias
