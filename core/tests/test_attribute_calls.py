"""Attributes of devices that go: calls that run are waited for before the vendor frees anything, others are refused."""

from __future__ import annotations

import errno

import pytest
from mdevkit import Attribute, Int, MdevError, device


class Dial:
    """An attribute whose every call can be made to wait or to call back."""

    def __init__(self):
        self.on_show = self.on_store = lambda mdev: None
        self.attribute = Attribute("dial", Int(0, 9), "For tests.", self.show, self.store)

    def show(self, mdev):
        self.on_show(mdev)
        return 7

    def store(self, mdev, value):
        self.on_store(mdev)


@pytest.fixture
def dial():
    return Dial()


@pytest.fixture
def card(kit, dial):
    return kit.Card(attributes=[dial.attribute])


def read(mdev):
    return mdev.get_attribute("dial")


def write(mdev):
    mdev.set_attribute("dial", 1)


def table(mdev):
    """As the service does."""
    return mdev.type.device_table.read("dial", mdev)


@pytest.mark.parametrize("how", ["remove", "unregister_parent"])
@pytest.mark.parametrize("call", [read, write, table])
def test_a_removal_waits_for_attributes_in_use_and_refuses_others(registry, card, dial, kit, thread, fails, call, how):
    mdev = registry.create("card-1")
    gate = dial.on_show = dial.on_store = kit.Gate()
    inside = thread(call, mdev)
    gate.wait()
    removing = thread(getattr(registry, how), mdev.uuid if how == "remove" else "card")
    kit.until(lambda: mdev.departing)
    assert fails(errno.ENODEV, call, mdev) == f"{mdev} is being removed"
    assert ("dial", "<ENODEV>") in mdev.type.device_table.read_all(mdev).items()
    assert ("remove", mdev.name) not in card.calls
    assert mdev.uuid in card.alive
    gate.open()
    assert inside.exception(kit.PATIENCE) is None
    removing.result(kit.PATIENCE)
    assert ("remove", mdev.name) in card.calls
    assert fails(errno.ENODEV, call, mdev) == f"{mdev} is gone"


def test_the_vendors_remove_finds_no_attribute_in_use(registry, card, kit, thread, fails):
    mdev = registry.create("card-1")
    gate = card.on_remove = kit.Gate()
    removing = thread(registry.remove, mdev.uuid)
    gate.wait()
    fails(errno.ENODEV, write, mdev)
    gate.open()
    removing.result(kit.PATIENCE)


def test_a_removal_that_may_be_refused_leaves_the_attributes(registry, taker, kit, thread, fails):
    mdev = registry.create("card-1")
    gate = kit.Gate()

    def hold(device, timeout, force):
        if not force:
            gate()
            raise MdevError(errno.EBUSY, "in use by pid 1")

    taker.on_let_go = hold
    removing = thread(registry.remove, mdev.uuid)
    gate.wait()
    assert read(mdev) == 7
    gate.open()
    fails(errno.EBUSY, removing.result, kit.PATIENCE)
    assert read(mdev) == 7


def test_an_attribute_may_remove_its_own_device(registry, card, dial, kit, thread):
    """As mdev's `remove` in sysfs; somebody else's call is waited for all the same."""
    mdev = registry.create("card-1")
    gate = dial.on_show = kit.Gate()
    reading = thread(read, mdev)
    gate.wait()
    dial.on_store = lambda mdev: registry.remove(mdev.uuid)
    writing = thread(write, mdev)
    kit.until(lambda: mdev.departing)
    assert ("remove", mdev.name) not in card.calls
    gate.open()
    reading.result(kit.PATIENCE)
    writing.result(kit.PATIENCE)
    assert registry.mdevs == []


def test_an_attribute_that_never_returns_does_not_keep_its_device(registry, card, dial, kit, thread, monkeypatch, caplog):
    monkeypatch.setattr(device, "DRAIN_LIMIT", 0.1)
    mdev = registry.create("card-1")
    gate = dial.on_show = kit.Gate()
    reading = thread(read, mdev)
    gate.wait()
    registry.remove(mdev.uuid)
    assert registry.mdevs == []
    assert f"{mdev}: an attribute of parent card does not return; it is removed all the same" in caplog.text
    gate.open()
    reading.result(kit.PATIENCE)


def test_a_parent_cannot_leave_from_inside_an_attribute_of_its_device(registry, dial, fails):
    """It would wait for a removal that may be waiting for this very call."""
    mdev = registry.create("card-1")
    dial.on_store = lambda mdev: registry.unregister_parent("card")
    text = fails(errno.EDEADLK, write, mdev)
    assert text == "parent card cannot be unregistered from inside a call to one of its devices"
    assert registry.get(mdev.uuid) is mdev


def test_a_create_that_is_rolled_back_waits_too(registry, card, taker, dial, kit, thread, fails):
    gate = dial.on_show = kit.Gate()
    reading = []

    def probe(device):
        reading.append((device, thread(read, device)))
        gate.wait()
        raise OSError(errno.EIO, "broken")

    taker.on_probe = probe
    creating = thread(registry.create, "card-1")
    kit.until(lambda: reading and reading[0][0].departing)
    assert len(card.alive) == 1
    gate.open()
    fails(errno.EIO, creating.result, kit.PATIENCE)
    assert reading[0][1].result(kit.PATIENCE) == 7
