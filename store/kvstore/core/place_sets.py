"""Places of blocks, and the sets of places that keys have in common."""

from dataclasses import dataclass, field

from kvstore.core.types import EndReason, Tier

_WITHOUT_REASONS = (EndReason.EVICTED, EndReason.PURGED)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where blocks can be; made by ``Locations.place`` only, so that identity is equality."""

    node_id: str
    tier: Tier
    engine_id: str
    root: bytes


@dataclass(slots=True, eq=False)
class PlaceSet:
    """The places that a group of keys has in common; without any, why they have none.

    ``with_place`` and ``without`` are edges to the sets that differ in one place; ``sources`` has
    the sets with an edge to this one, and the place in which they differ.
    """

    places: tuple[Place, ...]
    reason: EndReason
    keys: int = 0
    with_place: dict[Place, "PlaceSet"] = field(default_factory=dict)
    without: dict[tuple[Place, EndReason], "PlaceSet"] = field(default_factory=dict)
    sources: dict["PlaceSet", Place] = field(default_factory=dict)

    @classmethod
    def of(cls, places: set[Place], reason: EndReason) -> "PlaceSet":
        """A set without keys; ``reason`` counts only without places."""
        ordered = sorted(places, key=lambda p: (p.tier, p.node_id, p.engine_id))
        return cls(tuple(ordered), EndReason.COMPLETE if places else reason)

    @property
    def best(self) -> tuple[Place, ...]:
        """The places of the fastest tier; places are kept in the order of their tiers."""
        return tuple(p for p in self.places if p.tier == self.places[0].tier)

    def unlink(self) -> None:
        """Takes away all edges from and to this set."""
        for source, place in self.sources.items():
            if source.with_place.get(place) is self:
                del source.with_place[place]
            for reason in _WITHOUT_REASONS:
                if source.without.get((place, reason)) is self:
                    del source.without[place, reason]
        for target in (*self.with_place.values(), *self.without.values()):
            target.sources.pop(self, None)
