"""Suspend and resume: children before parents and back, all or none, and no device changes hands meanwhile."""

from __future__ import annotations

import errno

import pytest
from mdevkit import Bus, Device, Registry, State, hookimpl


class Powered(Bus):
    name = "bench"

    def __init__(self):
        self.calls = []
        self.on_suspend = self.on_resume = self.on_uevent = lambda device: None

    @hookimpl
    def bus_uevent(self, device):
        self.on_uevent(device)
        return device.uevent()

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


def test_a_resume_before_the_create_it_deferred_is_parked(system, bus):
    """Nobody binds anything after it: the resume is what the device waits for."""

    def resume(device):
        bus.on_uevent = lambda device: None
        system.resume()

    system.suspend()
    bus.on_uevent = resume
    assert system.create("card-1").state is State.BOUND


def test_a_suspend_that_fails_before_the_create_it_deferred_is_parked(system, bus, card, kit, thread):
    gate = kit.Gate()

    def suspend(parent):
        gate()
        refuse()

    def fail(device):
        bus.on_uevent = lambda device: None
        gate.open()
        assert isinstance(suspending.exception(kit.PATIENCE), OSError)

    card.on_suspend, bus.on_uevent = suspend, fail
    suspending = thread(system.suspend)
    gate.wait()
    assert system.create("card-1").state is State.BOUND


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


# -- what comes, and what does not go after all --------------------------------------------------------------------------


@pytest.fixture
def holding(system, taker, kit, thread):
    """A device whose removal waits for its user, who will hold on: returns it, the gate, and what becomes of the removal."""
    gate = kit.Gate()

    def hold(device, timeout, force):
        if not force:
            gate()
            raise OSError(errno.EBUSY, "in use by pid 1")

    taker.on_let_go = hold
    mdev = system.create("card-1")

    def begin():
        removing = thread(system.remove, mdev.uuid)
        gate.wait()
        return removing

    return mdev, gate, begin


@pytest.mark.parametrize("target", ["device", "card", None])
@pytest.mark.parametrize("call", ["suspend", "resume"])
def test_a_device_whose_removal_is_refused_is_not_left_out(system, holding, bus, kit, thread, fails, call, target):
    mdev, gate, begin = holding
    target = mdev.uuid if target == "device" else target
    if call == "resume":
        system.suspend(target)
    removing = begin()
    calling = thread(getattr(system, call), target)
    kit.until(lambda: mdev.lock._waiters)
    assert not calling.done()
    gate.open()
    fails(errno.EBUSY, removing.result, kit.PATIENCE)
    calling.result(kit.PATIENCE)
    assert (mdev.state, mdev.suspended) == ("bound", call == "suspend")
    assert (call, mdev.name) in bus.calls


@pytest.mark.parametrize("call", ["suspend", "resume"])
def test_a_sleep_asked_for_by_whoever_may_refuse_a_removal(system, taker, fails, call):
    mdev = system.create("card-1")
    texts = []
    taker.on_let_go = lambda device, timeout, force: texts.append(fails(errno.EDEADLK, getattr(system, call)))
    system.remove(mdev.uuid)
    assert texts == [f"{mdev} is removing on this very thread"]


def test_a_create_while_its_parent_is_being_suspended(system, card, kit, thread):
    """The list of what is to be suspended is made already: the newcomer must not run."""
    made = []
    card.on_suspend = lambda parent: made.append(thread(system.create, "card-1").result(kit.PATIENCE))
    system.suspend("card")
    assert (made[0].state, str(made[0].error)) == ("deferred", f"{made[0]}: parent card is being suspended")
    system.resume("card")
    assert made[0].state is State.BOUND


@pytest.mark.parametrize("target", ["card", None])
def test_a_create_that_was_past_its_probe_when_its_parent_was_suspended(system, bus, taker, target):
    """The driver has it, but nobody could have told the driver to quiesce it: the probe is taken back."""

    def suspend(device):
        bus.on_uevent = lambda device: None
        assert device.driver == "taker"
        system.suspend(target)

    bus.on_uevent = suspend
    mdev = system.create("card-1")
    assert (mdev.state, mdev.driver, mdev.endpoint, taker.held) == ("deferred", None, None, {})
    assert str(mdev.error) == f"{mdev}: parent card is suspended"
    system.resume(target)
    assert (mdev.state, list(taker.held)) == ("bound", [mdev.name])


def test_a_create_whose_sleep_has_ended_when_its_probe_is_to_be_taken_back(system, bus, taker, monkeypatch):
    def suspend(device):
        bus.on_uevent = lambda device: None
        system.suspend()

    put_off = system._core.put_off

    def late(device):
        system.resume()
        put_off(device)

    bus.on_uevent = suspend
    monkeypatch.setattr(system._core, "put_off", late)
    mdev = system.create("card-1")
    assert (mdev.state, mdev.error) == ("bound", None)
    assert taker.calls.count(("probe", mdev.name)) == 1


def test_an_interrupt_while_a_probe_is_taken_back_leaves_nothing(system, bus, card, taker):
    def suspend(device):
        bus.on_uevent = lambda device: None
        system.suspend()
        taker.on_remove = interrupt

    bus.on_uevent = suspend
    with pytest.raises(KeyboardInterrupt):
        system.create("card-1")
    taker.on_remove = lambda device: None
    assert (system.mdevs, card.alive, taker.held, card.pool.free) == ([], {}, {}, 8)


def test_what_is_added_below_a_device_while_that_is_being_suspended(system, taker, kit, thread):
    mdev = system.create("card-1")
    child = Device("virtio0", "bench", mdev)
    taker.on_suspend = lambda device: thread(system.add_device, child).result(kit.PATIENCE)
    system.suspend(mdev.uuid)
    assert (child.state, str(child.error)) == ("deferred", f"{child}: {mdev} is being suspended")
    system.resume(mdev.uuid)
    assert child.state is State.BOUND
    system.del_device(child)


def test_devices_of_the_parent_itself_and_those_of_nobody(system, bus, kit):
    """They sleep too: the parent's own after its mdevs, which may use them; those of nobody last of all."""
    for name in ("clock", "bridge"):
        system.register_driver(kit.Taker(name, (name,)))
        system.drivers[-1].calls = bus.calls
    clock, bridge = Device("clock", "bench"), Device("bridge", "bench", system.parent("card"))
    system.add_device(clock)
    system.add_device(bridge)
    mdev = system.create("card-1")
    calls(bus)
    system.suspend("card")
    assert [name for what, name in calls(bus) if what == "suspend"] == [mdev.name, "bridge", "card"]
    system.suspend()
    assert [name for what, name in calls(bus) if what == "suspend"] == ["clock"]
    assert all(item.suspended for item in (clock, bridge, mdev))
    system.resume()
    assert [name for what, name in calls(bus) if what == "resume"] == ["clock", "card", "bridge", mdev.name]
    assert not any(item.suspended for item in (clock, bridge, mdev))


# -- calls back ----------------------------------------------------------------------------------------------------------


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
