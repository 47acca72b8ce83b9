"""Waiting for adapters that come from far, on the event loop: no thread is held while a bucket works."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovms_lora.engine.lora_runtime import LoraRuntime
    from ovms_lora.server.registry import Selection
    from ovms_lora.server.workers import Workers


async def is_found(selection: Selection, workers: Workers) -> bool:
    """Whether the loading path of a base has the selected adapter. Raises UnavailableError where nobody can say."""
    lora, alias = selection.served.model.lora, selection.alias
    if lora is None or alias is None or lora.loading_path is None:
        return False
    found = await workers.block(lora.loading_path.find, alias)
    return found if isinstance(found, bool) else await asyncio.wrap_future(found)


async def arrive(lora: LoraRuntime, names: Iterable[str], workers: Workers) -> None:
    """Wait until adapters of the loading path can be used as local ones can.

    Raises ModelNotFoundError, AdapterUnavailableError or UnavailableError.
    """
    path = lora.loading_path
    if path is None or not path.is_far:
        return
    begun = [await workers.block(path.arriving, name) for name in names]
    for pending in filter(None, begun):
        await asyncio.wrap_future(pending)
