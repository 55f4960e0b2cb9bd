"""What a registry holds and how it is asked; the life of devices is in test_lifecycle.py."""

from __future__ import annotations

import errno
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from uuid import UUID, uuid4

import pytest
from mdevkit import Attribute, Bus, Device, Driver, Int, ParentOps, Pool, Registry, State, hookimpl
from mdevkit.dispatch import implementations
from mdevkit.plugins import Catalog, Plugin

UUIDS = [UUID(f"{prefix}0000000-0000-4000-8000-00000000000{prefix}") for prefix in "1234567"]


# -- registering -------------------------------------------------------------------------------------------------------


def test_what_there_is(registry, card, taker):
    assert [parent.name for parent in registry.parents] == ["card"]
    assert [kind.id for kind in registry.types] == ["card-1", "card-2"]
    assert [bus.name for bus in registry.buses] == ["bench"]
    assert registry.drivers == [taker]
    assert registry.mdevs == []
    mdev = registry.create("card-2")
    assert registry.mdevs == [mdev]
    assert registry.parent("card").types["card-2"] is mdev.type


def test_names_that_are_taken(registry, kit, card, taker, fails):
    assert fails(errno.EEXIST, registry.register_parent, kit.Card()) == "parent card is already registered"
    assert fails(errno.EEXIST, registry.register_parent, card) == "parent card is already registered"
    assert fails(errno.EEXIST, registry.register_bus, kit.Bus()) == "bus bench is already registered"
    assert fails(errno.EEXIST, registry.register_driver, kit.Taker()) == "driver taker is already registered on bus bench"
    registry.register_driver(kit.Taker(bus="other"))


def test_what_has_no_name(kit, fails):
    with Registry() as registry:
        assert fails(errno.EINVAL, registry.register_bus, Bus()) == "bus Bus has no name"
        assert fails(errno.EINVAL, registry.register_driver, kit.Taker("")) == "driver Taker has no name or no bus"
        assert fails(errno.EINVAL, registry.register_driver, kit.Taker(bus="")) == "driver Taker has no name or no bus"
        assert fails(errno.EINVAL, registry.register_parent, kit.Card("")) == "parent Card has no name"


def test_what_is_no_parent(kit, fails):
    with Registry() as registry:
        assert fails(errno.EINVAL, registry.register_parent, None) == "a parent is wanted, not a NoneType object"
        text = fails(errno.EINVAL, registry.register_parent, kit.Card)
        assert text == "a parent is wanted, not the class Card (an instance is wanted)"


@pytest.mark.parametrize("broken", ["name", "types", "attributes"])
def test_a_plugin_whose_properties_fail(kit, broken, fails):
    def wrong(self):
        raise ZeroDivisionError("in the vendor's code")

    class Broken(kit.Card):
        def __init__(self):
            pass

    vendor = type("Broken", (Broken,), {"name": "card", "types": (), broken: property(wrong)})()
    with Registry() as registry:
        text = fails(errno.EIO, registry.register_parent, vendor)
        assert text == "parent Broken cannot be registered: ZeroDivisionError: in the vendor's code"
        assert registry.parents == []


def test_a_driver_or_bus_whose_name_fails(kit, fails):
    class Odd(kit.Taker):
        def __init__(self):
            pass

        @property
        def name(self):
            raise ZeroDivisionError("in the vendor's code")

    class OddBus(Bus):
        name = Odd.name

    with Registry() as registry:
        reason = "cannot be registered: ZeroDivisionError: in the vendor's code"
        assert f"Odd {reason}" in fails(errno.EIO, registry.register_driver, Odd())
        assert f"OddBus {reason}" in fails(errno.EIO, registry.register_bus, OddBus())


def test_wrappers_are_told_apart_and_checked(kit, fails):
    class Audit:
        @hookimpl(wrapper=True)
        def parent_create(self, mdev):
            self.seen = mdev.name
            return (yield)

    audit = Audit()
    with Registry([kit.Card(), kit.Bus(), audit]) as registry:  # the wrapper comes last and wraps all the same
        mdev = registry.create("card-1", bind=False)
        assert audit.seen == mdev.name
    assert "implements no hook" in fails(errno.EINVAL, Registry, [object()])
    assert fails(errno.EINVAL, Registry, [kit.Card]) == "Card is a class; an instance is wanted"


def test_a_parent_may_come_back(registry, card, events):
    for _ in range(3):
        registry.create("card-1")
        registry.unregister_parent("card")
        assert registry.parents == registry.mdevs == []
        registry.register_parent(card)
    assert events(registry, "card", "MDEV_STATE")[:3] == [
        ("change", "card", "registered"),
        ("change", "card", "unregistered"),
        ("change", "card", "registered"),
    ]


def test_a_parent_that_could_not_be_registered_may_try_again(kit):
    first, second = kit.Card(), kit.Card()
    with Registry([first]) as registry:
        with pytest.raises(OSError, match="already registered"):
            registry.register_parent(second)
        registry.unregister_parent("card")
        registry.register_parent(second)


def test_of_several_parents_none_is_seen_before_the_last_is_checked(kit, fails, monkeypatch):
    """To take one back would be to wait for its creates, which may wait for the catalog that is locked meanwhile."""
    seen = []

    class Second(kit.Card):
        @property
        def driver_name(self):
            seen.extend(registry.parents)
            raise ZeroDivisionError("in the vendor's code")

        @driver_name.setter
        def driver_name(self, value):
            pass

    pair = [kit.Card("first"), Second("second")]
    vendor = ModuleType("acme_pair")
    vendor.pair = lambda: pair
    monkeypatch.setitem(sys.modules, "acme_pair", vendor)
    plugin = Plugin(EntryPoint("acme", "acme_pair:pair", "mdevkit.parents"))
    with Registry(catalog=Catalog([plugin])) as registry:
        assert "Second cannot be registered: ZeroDivisionError" in fails(errno.ENOEXEC, registry.use, plugin)
        assert (seen, registry.parents, registry.events.last) == ([], [], 0)
        assert pair[0].calls == [], "what was never registered is not unregistered"
        registry.register_parent(pair[0])


def test_several_parents_of_one_name(kit, fails):
    pair = [kit.Card("twin"), kit.Card("twin")]
    with Registry() as registry:
        assert fails(errno.EEXIST, registry._register_parents, pair) == "parent twin is already registered"
        assert registry.parents == []
        for card in pair:
            registry.register_parent(card)
            registry.unregister_parent("twin")


def test_a_registry_that_could_not_be_made_leaves_its_plugins_free(kit, fails):
    card, taker = kit.Card(), kit.Taker()
    fails(errno.EEXIST, Registry, [kit.Bus(), taker, card, kit.Taker()])
    fails(errno.EINVAL, Registry, [kit.Bus(), card, kit.Card("")])
    assert card.calls == [("unregister", "card")] * 2
    with Registry([kit.Bus(), taker, card]) as registry:
        assert registry.create("card-1").driver == "taker"


def test_two_registries_know_nothing_of_each_other(kit):
    uuid = uuid4()
    with Registry([kit.Bus(), kit.Card()]) as first, Registry([kit.Bus(), kit.Card()]) as second:
        first.create("card-1", uuid=uuid, bind=False)
        second.create("card-1", uuid=uuid, bind=False)
        first.remove(uuid)
        assert second.get(uuid).state is State.UNBOUND


def test_closing_ends_everything_and_may_be_repeated(kit, events):
    card, taker = kit.Card(), kit.Taker()
    registry = Registry([kit.Bus(), taker, card])
    mdev = registry.create("card-1")
    child = Device("child", "bench", mdev)
    alone = Device("alone", "bench")
    registry.add_device(child)
    registry.add_device(alone)
    for _ in range(2):
        registry.close()
    assert [device.state for device in (mdev, child, alone)] == [State.GONE] * 3
    assert (registry.parents, registry.drivers, registry.buses) == ([], [], [])
    assert (card.alive, taker.held) == ({}, {})
    assert events(registry, "alone")[-1] == ("remove", "alone")
    assert events(registry)[-4:] == [("remove", "child"), ("remove", mdev.name), ("change", "card"), ("remove", "alone")]


def test_closing_goes_on_when_a_vendor_fails(kit, caplog):
    card, taker = kit.Card(), kit.Taker()
    card.on_remove = card.on_unregister = taker.on_remove = taker.on_let_go = lambda *_: 1 / 0
    with Registry([kit.Bus(), taker, card]) as registry:
        mdevs = [registry.create("card-1") for _ in range(3)]
    assert all(mdev.state is State.GONE for mdev in mdevs)
    for what in ("busy", "driver taker: remove failed", "remove failed", "unregister failed"):
        assert f"{what}: ZeroDivisionError" in caplog.text


# -- looking -----------------------------------------------------------------------------------------------------------


def test_unknown_names_are_told_what_there_is(registry, fails):
    assert fails(errno.ENODEV, registry.parent, "car") == "there is no parent 'car' (there are: card)"
    assert fails(errno.ENODEV, registry.type, "card-3") == "there is no type 'card-3' (there are: card-1, card-2)"
    text = fails(errno.ENODEV, registry.type, "x", "card")
    assert text == "there is no type 'x' of parent card (there are: card-1, card-2)"
    assert fails(errno.ENODEV, registry.type, "card-1", "nobody") == "there is no parent 'nobody' (there are: card)"
    uuid = uuid4()
    assert fails(errno.ENODEV, registry.get, uuid) == f"there is no device {uuid}"
    assert fails(errno.EINVAL, registry.get, "x") == "'x' is not a UUID (8-4-4-4-12 hex digits)"


def test_a_registry_without_parents_says_what_to_install(fails):
    with Registry() as registry:
        text = fails(errno.ENODEV, registry.create, "mtty-2")
        hint = "no parent is installed (pip install mdevkit-mtty, for one; `mdevkit types` names others)"
        assert text == f"there is no type 'mtty-2': {hint}"
        assert fails(errno.ENODEV, registry.parent, "mtty") == "there is no parent 'mtty' (there are: none)"


def test_a_class_bus_that_is_not_there(kit, fails):
    with Registry([kit.Card(bus="mdev"), kit.Card("two", bus="acme")]) as registry:
        text = fails(errno.ENODEV, registry.create, "card-1")
        assert text == "type card-1: class bus mdev is not installed (pip install mdevkit-vfio)"
        assert fails(errno.ENODEV, registry.create, "two-1") == "type two-1: class bus acme is not installed"
        assert fails(errno.ENODEV, registry.bus, "acme") == "registry: class bus acme is not installed"


def test_a_device_by_the_beginning_of_its_uuid(registry, fails):
    mdevs = [registry.create("card-1", uuid=uuid) for uuid in UUIDS[:3]]
    extra = registry.create("card-1", uuid="1abcdef0-0000-4000-8000-000000000000")
    assert registry.find("2") is mdevs[1]
    assert registry.find("1A") is extra
    assert registry.find(str(UUIDS[2]).upper()) is mdevs[2]
    assert fails(errno.EINVAL, registry.find, "1") == f"'1' is the beginning of 2 devices' UUIDs: {mdevs[0].name}, {extra.name}"
    assert fails(errno.ENODEV, registry.find, "9") == "there is no device '9'"
    assert fails(errno.ENODEV, registry.find, str(UUIDS[5])) == f"there is no device {UUIDS[5]}"
    assert len(fails(errno.ENODEV, registry.find, "9" * 1_000_000)) < 120


def test_no_prefix_is_not_the_only_device(registry, fails):
    """``mdevkit remove "$UUID"`` with an unset variable."""
    registry.create("card-1")
    assert fails(errno.EINVAL, registry.find, "") == "a UUID or the beginning of one is wanted, not nothing"


def test_many_ambiguous_devices_are_named_in_part(registry, fails):
    for number in range(6):
        registry.create("card-1", uuid=f"aaaa000{number}-0000-4000-8000-000000000000")
    assert fails(errno.EINVAL, registry.find, "aaaa").endswith("aaaa0003-0000-4000-8000-000000000000, ...")


def test_a_type_of_several_parents_is_taken_where_there_is_room(kit, fails):
    first, second = kit.Card("one", 1, driver_name="card"), kit.Card("two", 1, driver_name="card")
    with Registry([kit.Bus(), first, second]) as registry:
        assert registry.create("card-1", bind=False, parent="two").parent.name == "two"
        assert registry.type("card-1").parent.name == "one"
        assert registry.create("card-1", bind=False).parent.name == "one"
        text = fails(errno.ENOSPC, registry.create, "card-1", bind=False)
        assert text.startswith("type card-1: no instance available: 1 of 1 ports wanted, 0 free (")


# -- devices seen from outside -----------------------------------------------------------------------------------------


def test_what_a_device_tells(registry):
    mdev = registry.create("card-1", uuid=UUIDS[0], params={"speed": "0x7"})
    assert (mdev.uuid, mdev.name, str(mdev)) == (UUIDS[0], str(UUIDS[0]), f"device {UUIDS[0]}")
    assert (mdev.parent.name, mdev.type.id, mdev.class_id, mdev.driver) == ("card", "card-1", 1, "taker")
    assert (mdev.match, mdev.modalias, mdev.state) == ("c01", "bench:c01", "bound")
    assert mdev.params == {"speed": 7, "mode": "fast"}
    assert mdev.endpoint.describe()["kind"] == "test"


def test_device_attributes(registry, fails):
    mdev = registry.create("card-1")
    mdev.set_attribute("speed", 9)
    assert mdev.get_attribute("speed") == 9
    assert fails(errno.EINVAL, mdev.set_attribute, "speed", 10) == "attribute speed: 10 is not between 0 and 9"
    assert fails(errno.EACCES, mdev.get_attribute, "mode") == f"attribute mode of {mdev} cannot be read"
    assert "has no attribute 'x' (there are: speed, mode)" in fails(errno.ENOENT, mdev.get_attribute, "x")
    registry.remove(mdev.uuid)
    assert fails(errno.ENODEV, mdev.get_attribute, "speed") == f"{mdev} is gone"
    assert fails(errno.ENODEV, mdev.set_attribute, "speed", 1) == f"{mdev} is gone"


def test_attributes_may_ask_the_registry(kit):
    """No lock is held while a vendor's show or store runs: it may look, and even remove its own device."""
    looks = Attribute("count", Int(), "Devices.", lambda mdev: len(registry.mdevs))
    quits = Attribute("quit", Int(), "Remove.", store=lambda mdev, value: registry.remove(mdev.uuid))
    with Registry([kit.Bus(), kit.Card(attributes=[looks, quits])]) as registry:
        mdev = registry.create("card-1", bind=False)
        assert mdev.get_attribute("count") == 1
        mdev.set_attribute("quit", 1)
        assert mdev.state is State.GONE


def test_the_bases_implement_no_more_than_they_say():
    assert implementations(ParentOps()) == implementations(Driver()) == {}
    assert set(implementations(Bus())) == {"bus_match", "bus_uevent"}


def test_a_pool_is_not_shared_by_accident(kit):
    assert kit.Card().pool is not kit.Card().pool
    assert Pool("ports", 1).holders == {}
