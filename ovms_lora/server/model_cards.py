"""Model cards: what can be asked for by name, as `/v1/models` and `/v3/models` list it.

Owns the list: bases, then adapters and composites that are loaded, then those that lie on a loading path. Reads
folders, so its functions are for a thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ovms_lora.core.errors import ConfigError
from ovms_lora.core.names import check_alias
from ovms_lora.server.registry import ServedModel
from ovms_lora.server.tenants import Tenant

_MARK = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A base (`parent` None), or an adapter or composite of one."""

    name: str
    root: str
    served: ServedModel
    parent: str | None = None

    def is_for(self, tenant: Tenant) -> bool:
        """Whether a tenant may use it, and so may see it."""
        return tenant.allows(self.name) if self.parent is None else tenant.allows(self.parent, self.name)


def listed_cards(models: Iterable[ServedModel]) -> list[ModelCard]:
    """Return the cards of all models, then those of their adapters; a name stands once."""
    models = tuple(models)
    cards: dict[str, ModelCard] = {served.name: _base_card(served) for served in models}
    for served in models:
        for card in _adapter_cards(served, models):
            cards.setdefault(card.name, card)
    return list(cards.values())


def card_of(models: Iterable[ServedModel], name: str) -> ModelCard | None:
    """Return the card of a model, of an alias, or of `<base>:<alias>`."""
    models = tuple(models)
    for card in listed_cards(models):
        if card.name == name:
            return card
    adapters = (card for served in models for card in _adapter_cards(served, models))
    return next((card for card in adapters if f"{card.parent}:{card.name}" == name), None)


def _base_card(served: ServedModel) -> ModelCard:
    return ModelCard(served.name, served.spec.entry.base_path, served)


def _adapter_cards(served: ServedModel, models: Iterable[ServedModel]) -> Iterator[ModelCard]:
    lora = served.model.lora
    if lora is None:
        return
    for card in lora.cards():
        yield ModelCard(card.alias, card.root, served, served.name)
    path = served.spec.lora.loading_path if served.spec.lora else None
    if path is None:
        return
    taken = {model.name for model in models}  # a model's name is no adapter's
    for alias in _folders(path):
        if alias not in taken and not lora.has(alias):
            yield ModelCard(alias, str(path / alias), served, served.name)


def _folders(path: Path) -> list[str]:
    """Return the names of the adapter folders in `path`; none when it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted(
                entry.name for entry in entries if (path / entry.name / _MARK).is_file() and _fits(entry.name)
            )
    except OSError:
        return []


def _fits(name: str) -> bool:
    try:
        check_alias(name)
    except ConfigError:
        return False
    return True
