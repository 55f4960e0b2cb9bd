"""What a host does for the service, on a registry of its own."""

from __future__ import annotations

from mdevkit import Bus, MdevType, ParentOps, Pool, Registry, hookimpl
from mdevkit_service.hostops import HostOps


class Slots(Pool):
    """Notes who takes some."""

    def __init__(self):
        super().__init__("slots", 1)
        self.takers = []

    def _hold(self, units, holder):
        self.takers.append(holder)
        super()._hold(units, holder)


class Shelf(Bus):
    name = "shelf"


class Card(ParentOps):
    name = "card"

    def __init__(self):
        self.pool = Slots()
        self.types = [MdevType("one", "shelf", "none", costs={self.pool: 1})]

    @hookimpl
    def parent_create(self, mdev, params):
        mdev._set_class(1, self)

    @hookimpl
    def parent_remove(self, mdev):
        """Nothing to give back."""


def test_a_dry_run_takes_no_instance_from_anybody_at_any_moment(refused):
    card = Card()
    with Registry([Shelf(), card]) as registry:
        ops = HostOps(registry, lambda: None)
        ops.call("check", {"type": "card-one", "parent": "card", "attributes": {}})
        assert card.pool.takers == []
        held = registry.create("card-one", bind=False).name
        refused("ENOSPC", lambda: ops.call("check", {"type": "card-one", "parent": "card", "attributes": {}}), f"{held} holds 1")
