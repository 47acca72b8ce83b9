"""Tiles without a device: they remember who was written into them last."""

from __future__ import annotations

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.engine.lora_states import TileIndices


class FakeTiles:
    """As many tiles of `width` rank rows as are asked for."""

    def __init__(self, width: int = 2) -> None:
        self.width = width
        self.count = 0
        self.owner: list[str] = []

    def resize(self, count: int) -> None:
        self.owner = [*self.owner[:count], *[""] * (count - self.count)]
        self.count = count

    def write(self, tiles: TileIndices, adapter: Adapter) -> None:
        assert len(set(tiles.tolist())) == len(tiles) == -(-adapter.max_rank // self.width)
        for tile in tiles:
            self.owner[tile] = adapter.digest

    def tiles(self, digest: str) -> list[int]:
        return [tile for tile, owner in enumerate(self.owner) if owner == digest]
