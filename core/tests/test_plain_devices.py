"""Devices that are no mdevs: those that drivers add on a bus of their own, and children of others."""

from __future__ import annotations

import errno

import pytest
from mdevkit import Device, MdevError, State


def test_plain_devices_are_added_matched_and_taken_away(registry, kit, events, fails):
    net = kit.Taker("net", ("virtio0",))
    registry.register_driver(net)
    mdev = registry.create("card-1")
    child = Device("virtio0", "bench", mdev)
    registry.add_device(child)
    assert (child.state, child.driver, list(mdev.children), child.lock is mdev.lock) == ("bound", "net", ["virtio0"], True)
    assert fails(errno.EEXIST, registry.add_device, child) == "device virtio0 is already on bus bench"
    assert fails(errno.EEXIST, registry.add_device, Device("virtio0", "bench")) == "device virtio0 is already on bus bench"
    registry.del_device(child)
    assert (child.state, mdev.children, net.held) == ("gone", {}, {})
    assert fails(errno.ENODEV, registry.del_device, child) == "device virtio0 is gone"
    assert [action for action, _ in events(registry, "virtio0")] == ["add", "bind", "unbind", "remove"]


def test_a_plain_device_without_a_driver_stays_unbound(registry, fails):
    device = Device("lonely", "bench")
    assert fails(errno.EAGAIN, registry.del_device, device) == "device lonely is creating; try again"
    registry.add_device(device)
    assert device.state is State.UNBOUND
    assert "no such bus" not in fails(errno.ENODEV, registry.add_device, Device("x", "nowhere"))
    registry.del_device(device)


def test_a_plain_device_below_one_that_goes_is_refused(registry, fails):
    mdev = registry.create("card-1")
    registry.remove(mdev.uuid)
    text = fails(errno.ENODEV, registry.add_device, Device("late", "bench", mdev))
    assert text == f"device late: its parent {mdev} is gone"
    registry.add_device(Device("late", "bench"))  # the name is free


def test_two_children_of_one_name_cannot_be(registry, kit, fails):
    """Nor could a folder of sysfs hold both."""

    class Rack(kit.Bus):
        name = "rack"

    registry.register_bus(Rack())
    for above in (registry.create("card-1"), registry.parent("card")):
        first = Device("port0", "bench", above)
        registry.add_device(first)
        text = fails(errno.EEXIST, registry.add_device, Device("port0", "rack", above))
        assert text == f"device port0: {above} has a device of that name already"
        assert above.children == {"port0": first}
        registry.del_device(first)


def test_children_go_with_their_parent(registry, caplog, events):
    mdev = registry.create("card-1")
    child = Device("child", "bench", mdev)
    grandchild = Device("grandchild", "bench", child)
    registry.add_device(child)
    registry.add_device(grandchild)
    registry.remove(mdev.uuid)
    assert [device.state for device in (mdev, child, grandchild)] == ["gone"] * 3
    assert events(registry)[-3:] == [("remove", "grandchild"), ("remove", "child"), ("remove", mdev.name)]
    assert f"device child is still there while {mdev} goes" in caplog.text
    assert mdev.children == child.children == {}


def test_devices_of_a_parent_go_with_it(registry, card, taker, kit, caplog, events):
    """After the vendor had the chance to take them away, and after the mdevs, which may use them."""
    registry.register_driver(kit.Taker("bridges", ("bridge", "own")))
    parent = registry.parent("card")
    bridge, own = Device("bridge", "bench", parent), Device("own", "bench", parent)
    registry.add_device(bridge)
    registry.add_device(own)
    mdev = registry.create("card-1")
    assert list(parent.children) == ["bridge", "own"]
    card.on_unregister = lambda parent: registry.del_device(own)
    registry.unregister_parent("card")
    assert (bridge.state, bridge.driver, own.state, parent.children) == ("gone", None, "gone", {})
    assert [subject for action, subject in events(registry) if action == "remove"] == [mdev.name, "own", "bridge"]
    assert "device bridge is still there while parent card goes" in caplog.text
    assert "device own is still there" not in caplog.text


def test_a_plain_device_below_a_parent_that_goes_is_refused(registry, card, fails):
    parent, texts = registry.parent("card"), []

    def add(parent):
        texts.append(fails(errno.ENODEV, registry.add_device, Device("late", "bench", parent)))

    card.on_unregister = add
    registry.unregister_parent("card")
    add(parent)
    assert texts == ["device late: its parent card is being unregistered"] * 2
    assert registry._core.devices == []


def test_a_parent_cannot_leave_from_inside_a_probe_of_its_own_device(registry, kit, fails):
    bridges = kit.Taker("bridges", ("bridge",))
    registry.register_driver(bridges)
    texts = []
    bridges.on_probe = lambda device: texts.append(fails(errno.EDEADLK, registry.unregister_parent, "card"))
    bridge = Device("bridge", "bench", registry.parent("card"))
    registry.add_device(bridge)
    assert texts == ["parent card cannot be unregistered from inside a call to one of its devices"]
    registry.del_device(bridge)


# -- below a device that is being created --------------------------------------------------------------------------------


class Nesting:
    """A probe that adds a device below its own, as virtio_mdev does, and one below that."""

    def __init__(self, registry):
        self.registry = registry
        self.error = None

    def __call__(self, device):
        if device.name != "child":
            child = Device("child", "bench", device)
            self.registry.add_device(child)
            self.registry.add_device(Device("grandchild", "bench", child))
            if self.error:
                raise self.error


@pytest.fixture
def nesting(registry, kit, taker):
    """The probe of the card's driver; another driver takes what it adds."""
    registry.register_driver(kit.Taker("net", ("child", "grandchild")))
    taker.on_probe = Nesting(registry)
    return taker.on_probe


def test_events_of_a_parent_come_before_those_of_its_children(registry, nesting, events):
    """device_add tells of a device before it probes it."""
    mdev = registry.create("card-1")
    assert events(registry)[1:] == [
        ("add", mdev.name),
        *[("add", "child"), ("bind", "child"), ("add", "grandchild"), ("bind", "grandchild")],
        ("bind", mdev.name),
    ]
    registry.del_device(mdev.children["child"])
    told = [("unbind", "child"), ("unbind", "grandchild"), ("remove", "grandchild"), ("remove", "child")]
    assert events(registry)[-4:] == told, "at once"
    registry.unbind(mdev.uuid)
    before = registry.events.last
    registry.attach(mdev.uuid)
    assert [subject for _, subject in events(registry)[before:]] == ["child"] * 2 + ["grandchild"] * 2 + [mdev.name]
    registry.del_device(mdev.children["child"])


def test_of_what_was_below_a_device_whose_creation_failed_nothing_is_told(registry, nesting, fails, events):
    nesting.error = MdevError(errno.EIO, "the second half of the probe failed")
    fails(errno.EIO, registry.create, "card-1")
    assert events(registry) == [("change", "card")]
    assert registry._core.devices == []


def test_what_a_deferred_probe_had_added_is_told_after_the_device(registry, nesting, events):
    def probe(device):
        nesting(device)
        if "-" in device.name:
            registry.del_device(device.children["child"])
            raise OSError(517, "later")

    registry.drivers[0].on_probe = probe
    mdev = registry.create("card-1")
    assert events(registry)[1] == ("add", mdev.name)
    assert [action for action, subject in events(registry) if subject == "child"] == ["add", "bind", "unbind", "remove"]


def test_the_vendors_own_children_come_after_their_device_too(registry, card, events):
    card.on_create = lambda mdev, params: registry.add_device(Device("clock", "bench", mdev))
    mdev = registry.create("card-1", bind=False)
    assert events(registry)[1:] == [("add", mdev.name), ("add", "clock")]
    registry.del_device(mdev.children["clock"])
