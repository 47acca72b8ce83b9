"""Tenants: who stands behind a key, what that one may use, and what keeps tenants apart.

Owns the rules; `keys` reads them, `auth` finds the tenant of a request. The paths that are not a tenant's stand in
`auth`, the share of the queue is kept by the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from starlette.requests import Request

from ovms_lora.core.errors import ForbiddenError

STATE = "tenant"  # where `auth` leaves it in a request's state


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant. `names` is what it may use, as models, aliases, `<base>:<alias>` or `<base>:*`; None is everything.

    `queue_share`, 0 … 1, is how much of the queue its waiting requests may take.
    """

    name: str = ""
    names: frozenset[str] | None = None
    queue_share: float = 1.0

    def allows(self, base: str, alias: str | None = None) -> bool:
        """Whether it may use a model, or an adapter or composite of it."""
        if self.names is None:
            return True
        wanted = {base} if alias is None else {alias, f"{base}:{alias}", f"{base}:*"}
        return not self.names.isdisjoint(wanted)

    def check(self, base: str, alias: str | None = None) -> None:
        """Raise ForbiddenError for what it may not use."""
        if not self.allows(base, alias):
            raise ForbiddenError(base if alias is None else alias)

    def names_exactly(self, model: str) -> bool:
        """Whether it may hear that there is no such model: of names that are not its own it learns nothing."""
        return self.names is None or model in self.names

    def check_blend(self, base: str, aliases: Iterable[str]) -> None:
        """Raise ForbiddenError when it may not use one of the adapters of a blend."""
        for alias in aliases:
            self.check(base, alias)

    def salt(self, given: str) -> str:
        """Return the salt of prefix blocks: no two tenants share any, whatever salts they give."""
        return f"{self.name}\0{given}" if self.name or given else ""


# Whoever has a key without a tenant, or needs none.
PUBLIC = Tenant()


def tenant_of(request: Request) -> Tenant:
    """Return the tenant of a request."""
    tenant: Tenant = getattr(request.state, STATE, PUBLIC)
    return tenant
