"""Suspend and resume: children before parents and back, all or none, and no device changes hands meanwhile."""

from __future__ import annotations

import errno

import pytest
from mdevkit import Bus, Device, Registry, State, hookimpl


class Powered(Bus):
    name = "bench"

    def __init__(self):
        self.calls = []
        self.on_suspend = self.on_resume = lambda device: None

    @hookimpl
    def bus_suspend(self, device):
        self.calls.append(("bus suspend", device.name))
        self.on_suspend(device)

    @hookimpl
    def bus_resume(self, device):
        self.calls.append(("bus resume", device.name))
        self.on_resume(device)


@pytest.fixture
def bus():
    return Powered()


@pytest.fixture
def system(kit, bus, card, taker):
    """A card, and one list of all calls in their order."""
    card.calls = taker.calls = bus.calls
    with Registry([bus, taker, card, kit.Taker("net", ("virtio0",))]) as registry:
        registry.drivers[1].calls = bus.calls
        yield registry


def refuse(*_):
    raise OSError(errno.EBUSY, "not now")


def interrupt(*_):
    raise KeyboardInterrupt


def calls(bus):
    taken, bus.calls[:] = list(bus.calls), []
    return taken


def test_children_before_parents_and_back(system, bus):
    first, second = system.create("card-1"), system.create("card-1")
    child = Device("virtio0", "bench", first)
    system.add_device(child)
    calls(bus)
    system.suspend()
    down = [
        *[("suspend", second.name), ("bus suspend", second.name)],
        *[("suspend", "virtio0"), ("bus suspend", "virtio0"), ("suspend", first.name), ("bus suspend", first.name)],
        ("suspend", "card"),
    ]
    assert calls(bus) == down
    assert all(item.suspended for item in (first, second, child, system.parent("card")))
    system.suspend()
    assert calls(bus) == [], "what sleeps is left alone"
    system.resume()
    swapped = {"suspend": "bus resume", "bus suspend": "resume"}
    up = [("resume" if name == "card" else swapped[what], name) for what, name in reversed(down)]
    assert calls(bus) == [
        up[0], ("bus resume", first.name), ("resume", first.name), ("bus resume", "virtio0"), ("resume", "virtio0"),
        ("bus resume", second.name), ("resume", second.name),
    ]  # fmt: skip
    assert not any(item.suspended for item in (first, second, child, system.parent("card")))
    system.resume()
    assert calls(bus) == []
    system.del_device(child)


def test_one_device_or_one_parent(system, bus, kit):
    other = kit.Card("other")
    other.calls = bus.calls
    system.register_parent(other)
    one, two, foreign = system.create("card-1"), system.create("card-1"), system.create("other-1")
    calls(bus)
    system.suspend(one.uuid)
    assert calls(bus) == [("suspend", one.name), ("bus suspend", one.name)]
    assert (one.state, two.suspended) == ("bound", False)
    system.suspend("card")
    assert calls(bus) == [("suspend", two.name), ("bus suspend", two.name), ("suspend", "card")]
    assert not foreign.suspended
    system.resume("card")
    assert not any(item.suspended for item in (one, two, system.parent("card")))


def test_a_device_is_not_resumed_below_a_parent_that_sleeps(system, fails):
    mdev = system.create("card-1")
    system.suspend("card")
    assert fails(errno.EBUSY, system.resume, mdev.uuid) == f"{mdev}: parent card is suspended; resume that"


def test_names_that_are_nothing(system, fails):
    assert fails(errno.ENODEV, system.suspend, "nobody") == "there is no device or parent 'nobody'"
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    assert fails(errno.ENODEV, system.resume, uuid) == f"there is no device {uuid}"


@pytest.mark.parametrize("who", ["driver", "bus", "parent"])
@pytest.mark.parametrize("how", [refuse, interrupt])
def test_a_refusal_resumes_what_was_suspended(system, bus, card, taker, who, how, fails):
    mdevs = [system.create("card-1") for _ in range(3)]
    calls(bus)
    {"driver": taker, "bus": bus, "parent": card}[who].on_suspend = (
        how if who == "parent" else lambda device: how() if device is mdevs[0] else None
    )
    if how is refuse:
        text = fails(errno.EBUSY, system.suspend)
        assert text.endswith("suspend refused: not now")
        assert text.startswith("parent card" if who == "parent" else str(mdevs[0]))
    else:
        with pytest.raises(KeyboardInterrupt):
            system.suspend()
    assert not any(item.suspended for item in (*mdevs, system.parent("card")))
    assert not system._core.suspended
    done = calls(bus)
    for mdev in mdevs[1:]:
        assert [what for what, name in done if name == mdev.name] == ["suspend", "bus suspend", "bus resume", "resume"]
    mine = [what for what, name in done if name == mdevs[0].name]
    whole = ["suspend", "bus suspend", "bus resume", "resume"]
    assert mine == {"driver": ["suspend"], "bus": ["suspend", "bus suspend", "resume"], "parent": whole}[who]
    assert {mdev.state for mdev in mdevs} == {State.BOUND}
    system.create("card-1")


def test_the_refusal_of_a_bus_is_told_even_if_the_driver_cannot_resume(system, bus, taker, fails, caplog):
    system.create("card-1")
    bus.on_suspend, taker.on_resume = refuse, lambda device: 1 / 0
    assert "bus bench: suspend refused: not now" in fails(errno.EBUSY, system.suspend)
    assert "driver taker: resume failed: ZeroDivisionError" in caplog.text


def test_what_cannot_resume_does_not_keep_the_others_asleep(system, bus, taker, card, fails):
    mdevs = [system.create("card-1") for _ in range(3)]
    system.suspend()
    calls(bus)
    card.on_resume = taker.on_resume = bus.on_resume = refuse
    assert fails(errno.EBUSY, system.resume) == "parent card: resume failed: not now"
    assert not any(item.suspended for item in (*mdevs, system.parent("card")))
    assert len(calls(bus)) == 7, "every callback was called"


def test_probes_are_deferred_while_everything_sleeps(system, taker):
    bound, unbound = system.create("card-1"), system.create("card-1", bind=False)
    system.suspend()
    new = system.create("card-1")
    system.attach(unbound.uuid)
    assert (new.state, unbound.state) == ("deferred", "deferred")
    assert str(new.error) == f"{new}: parent card is suspended"
    assert (taker.held.keys(), bound.state) == ({bound.name}, "bound")
    system.resume()
    assert (new.state, unbound.state) == ("bound", "bound")


def test_probes_are_deferred_while_the_device_or_its_parent_sleeps(system):
    unbound = system.create("card-1", bind=False)
    system.suspend(unbound.uuid)
    system.attach(unbound.uuid)
    assert (unbound.state, str(unbound.error)) == ("deferred", f"{unbound}: {unbound} is suspended")
    system.create("card-1")
    assert unbound.state is State.DEFERRED
    system.resume(unbound.uuid)
    assert (unbound.state, unbound.suspended) == ("bound", False)


def test_a_parent_that_came_while_everything_slept(system, kit):
    system.suspend()
    system.register_parent(kit.Card("late"))
    mdev = system.create("late-1")
    assert (mdev.state, str(mdev.error)) == ("deferred", f"{mdev}: the system is suspended")
    system.resume()
    assert mdev.state is State.BOUND


def test_a_probe_that_was_deferred_by_a_suspend_that_failed(system, card, fails):
    made = []

    def suspend(parent):
        made.append(system.create("card-1"))
        refuse()

    card.on_suspend = suspend
    fails(errno.EBUSY, system.suspend)
    assert [mdev.state for mdev in made] == ["bound"]


def test_unbinding_a_sleeping_device_wakes_nobody(system, bus):
    mdev = system.create("card-1")
    system.suspend(mdev.uuid)
    calls(bus)
    system.unbind(mdev.uuid)
    assert not mdev.suspended
    system.attach(mdev.uuid)
    system.resume(mdev.uuid)
    assert ("resume", mdev.name) not in calls(bus)


def test_one_suspend_at_a_time(system, taker, kit, thread, fails):
    system.create("card-1")
    gate = taker.on_suspend = kit.Gate()
    suspending = thread(system.suspend)
    gate.wait()
    assert fails(errno.EBUSY, system.suspend) == "a suspend or resume is running"
    assert fails(errno.EBUSY, system.resume) == "a suspend or resume is running"
    gate.open()
    suspending.result(kit.PATIENCE)


@pytest.mark.parametrize("call", ["unbind", "remove", "unregister_driver", "unregister_parent"])
def test_a_device_is_not_taken_away_during_its_callbacks(system, bus, taker, kit, thread, call):
    """The driver would be suspended for a device it no longer has."""
    mdev = system.create("card-1")
    gate = taker.on_suspend = kit.Gate()
    suspending = thread(system.suspend, mdev.uuid)
    gate.wait()
    assert mdev.state is State.SUSPENDING
    arguments = {"unregister_driver": ("bench", "taker"), "unregister_parent": ("card",)}.get(call, (mdev.uuid,))
    going = thread(getattr(system, call), *arguments)
    kit.until(lambda: mdev.lock._waiters)
    assert ("remove", mdev.name) not in bus.calls
    gate.open()
    suspending.result(kit.PATIENCE)
    going.result(kit.PATIENCE)
    told = [what for what, name in bus.calls if name == mdev.name]
    assert told.index("bus suspend") < told.index("remove")


def test_a_device_that_goes_is_left_out(system, taker, kit, thread):
    mdev, other = system.create("card-1"), system.create("card-1")
    gate = taker.on_remove = kit.Gate()
    removing = thread(system.remove, mdev.uuid)
    gate.wait()
    system.suspend()
    assert (mdev.suspended, other.suspended) == (False, True)
    system.resume()
    gate.open()
    removing.result(kit.PATIENCE)


@pytest.mark.parametrize("call", ["suspend", "resume"])
def test_callbacks_from_power_hooks(system, taker, call, fails):
    mdev = system.create("card-1")
    texts = []

    def callback(device):
        texts.append(fails(errno.EDEADLK, system.unbind, device.uuid))
        texts.append(fails(errno.EDEADLK, system.remove, device.uuid))
        fails(errno.EBUSY, system.suspend)

    setattr(taker, f"on_{call}", callback)
    system.suspend()
    system.resume()
    assert texts == [f"{mdev} is {'suspending' if call == 'suspend' else 'resuming'} on this very thread"] * 2


def test_suspending_from_inside_a_probe(system, taker, fails):
    """A device in the middle of a probe on the same thread can be neither suspended nor waited for."""
    mdev, other = system.create("card-1", bind=False), system.create("card-1")
    texts = []
    taker.on_probe = lambda device: texts.append(fails(errno.EDEADLK, system.suspend))
    system.attach(mdev.uuid)
    assert texts == [f"{mdev} is probing on this very thread"]
    assert (mdev.state, other.suspended, system._core.suspended) == ("bound", False, False)
