"""Deferred probe: no failure, tried again after any successful bind, and no wake-up is ever lost."""

from __future__ import annotations

import errno
import threading

import pytest
from mdevkit import Device, ProbeDeferredError, State, hookimpl


class Waiting:
    """A probe that wants to be deferred until `ready`, and counts how often it was asked."""

    def __init__(self):
        self.ready = False
        self.asked = 0

    def __call__(self, device):
        self.asked += 1
        if not self.ready:
            raise ProbeDeferredError(f"{device}: the clock is missing", device)


@pytest.fixture
def waiting(taker):
    taker.on_probe = Waiting()
    return taker.on_probe


@pytest.fixture
def other(registry, kit):
    """A driver that makes a bind happen somewhere: see `bind_something`."""
    driver = kit.Taker("other", ("clock", "second"))
    registry.register_driver(driver)
    return driver


def bind_something(registry, name="clock"):
    device = Device(name, "bench")
    registry.add_device(device)
    assert device.state is State.BOUND
    registry.del_device(device)


def test_a_deferred_create_is_no_failure(registry, waiting, card, events):
    mdev = registry.create("card-1")
    assert (mdev.state, mdev.driver, str(mdev.error), mdev.error.errno) == ("deferred", None, f"{mdev}: the clock is missing", 517)
    assert list(card.alive) == [mdev.uuid]
    assert events(registry, mdev.name) == [("add", mdev.name)]


def test_a_plain_oserror_517_is_a_deferral_too(registry, taker):
    def probe(device):
        raise OSError(517, "later")

    taker.on_probe = probe
    assert registry.create("card-1").state is State.DEFERRED


def test_it_is_tried_again_after_any_bind(registry, waiting, other, events):
    mdev = registry.create("card-1")
    bind_something(registry)
    assert (mdev.state, waiting.asked) == ("deferred", 2)
    waiting.ready = True
    bind_something(registry)
    assert (mdev.state, mdev.driver, mdev.error, waiting.asked) == ("bound", "taker", None, 3)
    assert [action for action, _ in events(registry, mdev.name)] == ["add", "bind"]
    bind_something(registry)
    assert waiting.asked == 3, "it is off the list"


@pytest.mark.parametrize("how", ["create", "attach", "bind"])
def test_every_kind_of_bind_wakes(registry, waiting, kit, how):
    registry.register_driver(kit.Taker("aaa", ("c01",)))
    mdev = registry.create("card-1", driver_override="taker")
    waiting.ready = True
    trigger = registry.create("card-1", bind=how == "create", driver_override="aaa")
    if how == "attach":
        registry.attach(trigger.uuid)
    elif how == "bind":
        registry.bind(trigger.uuid, "aaa")
    assert (trigger.driver, mdev.driver) == ("aaa", "taker")


def test_a_chain_of_dependencies_resolves(registry, taker, other):
    """Each waits for the one created after it; one bind at the end frees them all."""
    ready = {}

    def probe(device):
        if not ready.get(device.drvdata, True):
            raise ProbeDeferredError("not yet", device)
        ready[device.drvdata - 1] = True

    taker.on_probe = probe
    ready.update(dict.fromkeys(range(6), False))
    mdevs = [registry.create("card-1", params={"speed": speed}) for speed in range(6)]
    assert {mdev.state for mdev in mdevs} == {State.DEFERRED}
    registry.create("card-1", params={"speed": 6})
    assert {mdev.state for mdev in mdevs} == {State.BOUND}


def test_a_retry_that_fails_for_good_is_told_and_taken_off_the_list(registry, taker, waiting, other, events, caplog):
    mdev = registry.create("card-1")

    def probe(device):
        raise OSError(errno.EIO, "broken")

    taker.on_probe = probe
    bind_something(registry)
    assert (mdev.state, str(mdev.error)) == ("unbound", f"{mdev}: driver taker: probe failed: broken")
    assert events(registry, mdev.name, "ERROR")[-1] == ("change", mdev.name, f"{mdev}: driver taker: probe failed: broken")
    assert "probe failed: broken" in caplog.text
    taker.on_probe = waiting
    waiting.ready = True
    bind_something(registry)
    assert mdev.state is State.UNBOUND


def test_one_that_would_and_one_that_defers(registry, waiting, kit):
    """Linux: a device is deferred if any driver asked for it, unless one bound it."""
    good = kit.Taker("zzz")
    registry.register_driver(good)
    assert registry.create("card-1").driver == "zzz"

    def probe(device):
        raise OSError(errno.EIO, "broken")

    good.on_probe = probe
    assert registry.create("card-1").state is State.DEFERRED


def test_a_deferred_device_can_be_removed(registry, waiting, other):
    mdev = registry.create("card-1")
    registry.remove(mdev.uuid)
    waiting.ready = True
    bind_something(registry)
    assert (mdev.state, waiting.asked, registry._core._deferred) == ("gone", 1, {})


def test_a_failed_bind_by_hand_leaves_it_deferred(registry, waiting, kit, other, fails):
    mdev = registry.create("card-1")
    wrong = kit.Taker("wrong", ("c02",))
    registry.register_driver(wrong)

    def probe(device):
        raise OSError(errno.EIO, "broken")

    wrong.on_probe = probe
    fails(errno.ENODEV, registry.bind, mdev.uuid, "wrong")
    fails(errno.EIO, registry.bind, mdev.uuid, "wrong", override=True)
    assert (mdev.state, mdev.driver_override) == ("deferred", None)
    fails(errno.ENODEV, registry.unbind, mdev.uuid)
    waiting.ready = True
    bind_something(registry)
    assert mdev.driver == "taker"


def test_an_attach_that_fails_for_good_ends_the_waiting(registry, taker, waiting, fails):
    mdev = registry.create("card-1")

    def probe(device):
        raise OSError(errno.EIO, "broken")

    taker.on_probe = probe
    fails(errno.EIO, registry.attach, mdev.uuid)
    assert (mdev.state, registry._core._deferred) == ("unbound", {})


# -- a probe that adds devices and then asks to be deferred --------------------------------------------------------------


class Impatient:
    """A probe that adds a clock, which binds, takes it away, and asks to be deferred."""

    def __init__(self, registry):
        self.registry = registry
        self.asked = 0
        self.ready = False

    def __call__(self, device):
        self.asked += 1
        assert self.asked < 9, "it wakes itself for ever"
        clock = Device("clock", "bench", device)
        self.registry.add_device(clock)
        assert clock.state is State.BOUND
        if not self.ready:
            self.registry.del_device(clock)
            raise ProbeDeferredError(f"{device}: the firmware is missing", device)


@pytest.mark.parametrize("how", ["create", "attach", "bind"])
def test_what_a_deferred_probe_bound_wakes_nobody(registry, taker, other, how):
    probe = taker.on_probe = Impatient(registry)
    mdev = registry.create("card-1", bind=how == "create")
    if how == "attach":
        registry.attach(mdev.uuid)
    elif how == "bind":
        registry.bind(mdev.uuid, "taker")
    assert (mdev.state, probe.asked) == ("deferred", 1)
    bind_something(registry, "second")
    assert (mdev.state, probe.asked) == ("deferred", 2)
    probe.ready = True
    bind_something(registry, "second")
    assert mdev.state is State.BOUND
    registry.del_device(mdev.children["clock"])


def test_what_is_bound_below_a_device_by_somebody_else_wakes_at_once(registry, taker, kit, thread, other):
    """The device below may stay, whatever becomes of the probe that another thread is in."""
    waiting = taker.on_probe = Waiting()
    early = registry.create("card-1")
    late = registry.create("card-1", bind=False)
    gate = kit.Gate()
    taker.on_probe = lambda device: gate() if device is late else waiting(device)
    attaching = thread(registry.attach, late.uuid)
    gate.wait()
    waiting.ready = True
    registry.add_device(Device("clock", "bench", late))
    assert early.state is State.BOUND
    gate.open()
    attaching.result(kit.PATIENCE)
    registry.del_device(late.children["clock"])


# -- no wake-up is lost ------------------------------------------------------------------------------------------------


class Racing:
    """A probe that finds nothing, lets the test bind what it looked for, and only then asks to be deferred."""

    def __init__(self, gate):
        self.gate, self.ready = gate, False

    def __call__(self, device):
        found = self.ready
        if not self.gate.entered.is_set():
            self.gate()
        if not found:
            raise ProbeDeferredError(f"{device}: it was not there when I looked", device)


@pytest.mark.parametrize("how", ["create", "attach", "bind"])
def test_a_bind_during_a_probe_that_is_deferred(registry, taker, kit, thread, other, how):
    """The trigger of dd.c: the device was not on the list when the bind happened."""
    probe = taker.on_probe = Racing(kit.Gate())
    if how == "create":
        done = thread(registry.create, "card-1")
    else:
        mdev = registry.create("card-1", bind=False)
        done = thread(registry.attach, mdev.uuid) if how == "attach" else thread(registry.bind, mdev.uuid, "taker")
    probe.gate.wait()
    probe.ready = True
    bind_something(registry)
    probe.gate.open()
    mdev = done.result(kit.PATIENCE) or mdev
    assert (mdev.state, mdev.driver) == ("bound", "taker")


def test_a_bind_during_a_retry(registry, taker, kit, thread, other):
    """The one thread that retries is in the probe; the binding thread leaves the retry to it, and it must not stop there."""
    taker.on_probe = Waiting()
    mdev = registry.create("card-1")
    probe = taker.on_probe = Racing(kit.Gate())
    retrying = thread(bind_something, registry)
    probe.gate.wait()
    probe.ready = True
    bind_something(registry, "second")
    assert not retrying.done(), "the other thread came back without waiting"
    probe.gate.open()
    retrying.result(kit.PATIENCE)
    assert mdev.state is State.BOUND


def test_a_bind_while_a_wrong_driver_is_tried_by_hand(registry, taker, kit, thread, other, fails):
    """The device is off the list for as long as somebody tries to bind it; when that fails it must not have missed anything."""
    waiting = taker.on_probe = Waiting()
    mdev = registry.create("card-1")
    gate = kit.Gate()

    def probe(device):
        gate()
        raise OSError(errno.EIO, "broken")

    wrong = kit.Taker("wrong", ("c02",))
    wrong.on_probe = probe
    registry.register_driver(wrong)
    binding = thread(registry.bind, mdev.uuid, "wrong", override=True)
    gate.wait()
    waiting.ready = True
    bind_something(registry)
    gate.open()
    assert fails(errno.EIO, binding.result, kit.PATIENCE).endswith("broken")
    assert (mdev.state, mdev.driver) == ("bound", "taker")


def test_a_probe_that_hangs_does_not_hold_up_the_creation_of_others(registry, taker, kit, thread):
    """Who binds retries the deferred ones; one that has come into somebody else's hands meanwhile is left to them."""
    taker.on_probe = Waiting()
    first, second = registry.create("card-1"), registry.create("card-1")
    gates = {first.name: kit.Gate(), second.name: kit.Gate()}
    taker.on_probe = lambda device: gates[device.name]() if device.name in gates else None
    creating = thread(registry.create, "card-1")
    gates[first.name].wait()  # the creator retries the first, and has the second on its list
    attaching = thread(registry.attach, second.uuid)
    gates[second.name].wait()
    gates[first.name].open()
    assert creating.result(kit.PATIENCE).state is State.BOUND
    assert (first.state, second.state) == ("bound", "probing")
    gates[second.name].open()
    attaching.result(kit.PATIENCE)
    assert second.state is State.BOUND


def test_a_probe_that_adds_a_device_of_its_own(registry, taker, other):
    """As virtio_mdev does: what is bound inside wakes others when the outer probe has succeeded."""
    waiting = taker.on_probe = Waiting()
    early = registry.create("card-1")
    states = []

    def probe(device):
        waiting(device)
        if device is not early:
            registry.add_device(Device("clock", "bench", device))
            states.append(early.state)

    taker.on_probe = probe
    waiting.ready = True
    mdev = registry.create("card-1")
    assert states == [State.DEFERRED]
    assert [device.state for device in (early, mdev, mdev.children["clock"])] == [State.BOUND] * 3
    registry.del_device(mdev.children["clock"])


def test_an_interrupt_during_a_retry_does_not_end_all_retries(registry, taker, other):
    waiting = taker.on_probe = Waiting()
    mdev = registry.create("card-1")

    def probe(device):
        raise KeyboardInterrupt

    taker.on_probe = probe
    with pytest.raises(KeyboardInterrupt):
        bind_something(registry)
    registry.del_device(registry._core.devices[0])
    assert mdev.state is State.DEFERRED
    taker.on_probe = waiting
    waiting.ready = True
    bind_something(registry)
    assert mdev.state is State.BOUND


def test_many_threads_many_dependencies(registry, taker, kit, thread):
    """Each device waits for another to have been bound; whatever the order and the interleaving, all end up bound."""
    card = kit.Card("big", 400)
    registry.register_parent(card)
    bound, lock, count = set(), threading.Lock(), 60

    def probe(device):
        number = int(device.name[:8], 16)
        with lock:
            if number and number - 1 not in bound:
                raise ProbeDeferredError("the one before me is missing", device)
        with lock:
            bound.add(number)

    taker.on_probe = probe
    numbers = [(number * 37) % count for number in range(count)]

    def create(mine):
        return [registry.create("big-1", uuid=f"{number:08x}-0000-4000-8000-000000000000") for number in mine]

    made = [future.result(kit.PATIENCE) for future in [thread(create, numbers[start::6]) for start in range(6)]]
    assert {mdev.state for mdevs in made for mdev in mdevs} == {State.BOUND}
    assert registry._core._deferred == {}
    registry.unregister_parent("big")


def test_a_wrapper_may_defer_a_probe_it_does_not_own(registry, kit, card, taker):
    class Later:
        late = True

        @hookimpl(wrapper=True)
        def driver_probe(self, device):
            if self.late:
                raise ProbeDeferredError(f"{device}: not on Sundays", device)
            return (yield)

    later = Later()
    with type(registry)([later, kit.Bus(), kit.Card("own"), kit.Taker()]) as mine:
        mdev = mine.create("own-1")
        assert (mdev.state, str(mdev.error)) == ("deferred", f"{mdev}: not on Sundays")
        later.late = False
        mine.create("own-1")
        assert mdev.state is State.BOUND
