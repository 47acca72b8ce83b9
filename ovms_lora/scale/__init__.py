"""Many replicas: where requests go, and how many replicas a load needs. Imports the server; nothing imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovms_lora.scale.app import build_app

__all__ = ["build_app"]


def __getattr__(name: str) -> Any:
    """Import `build_app` when it is asked for: planning and routing policy need no Ray."""
    if name == "build_app":
        from ovms_lora.scale.app import build_app

        return build_app
    raise AttributeError(name)
