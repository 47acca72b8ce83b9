"""Model cards: what can be asked for by name, as `/v1/models` and `/v3/models` list it.

Owns the list: bases, then adapters and composites that are loaded, then those that lie on a loading path. Reads
folders, so its functions are for a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ovms_lora.server.registry import ServedModel
from ovms_lora.server.tenants import Tenant


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
    path = lora.loading_path
    found = path.names() if path else ()  # first: it lets go of what is gone
    for card in lora.cards():
        yield ModelCard(card.alias, card.root, served, served.name)
    taken = {model.name for model in models}  # a model's name is no adapter's
    for alias in found:
        if path and alias not in taken and not lora.has(alias):
            yield ModelCard(alias, path.root(alias), served, served.name)
