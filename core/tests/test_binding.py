"""Which driver gets a device, bind and unbind by hand, driver_override, and drivers that go (rule 11, drivers/base/dd.c)."""

from __future__ import annotations

import errno
import threading

import pytest
from mdevkit import Bus, Device, MdevError, Registry, State, hookimpl


def raiser(*arguments):
    def hook(*_):
        raise OSError(*arguments)

    return hook


@pytest.fixture
def two(registry, kit):
    """A second driver of the same id, that comes first by name."""
    second = kit.Taker("better")
    registry.register_driver(second)
    return second


def gone_before_probe(device):
    raise OSError(errno.ENODEV, "not mine")


# -- matching ----------------------------------------------------------------------------------------------------------


def test_the_first_by_name_whose_probe_succeeds_wins(registry, two, taker):
    assert registry.create("card-1").driver == "better"
    two.on_probe = gone_before_probe
    assert registry.create("card-1").driver == "taker"
    assert len(two.calls) == 2


def test_only_drivers_with_the_id_are_asked(registry, kit, card):
    drivers = [kit.Taker("a", ("c02", "c03")), kit.Taker("b", ()), kit.Taker("c", ("c0",)), kit.Taker("d", ("c01*", "C01"))]
    for driver in drivers:
        registry.register_driver(driver)
    assert registry.create("card-1").driver == "taker"
    card.class_id = 3
    assert registry.create("card-1").driver == "a"
    assert [driver.calls for driver in drivers[1:]] == [[], [], []]


def test_no_driver_names_alias_and_package(registry, card, kit, fails):
    card.class_id = 9
    text = fails(errno.ENODEV, registry.create, "card-1", uuid="83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
    assert text == "device 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001: no driver for bench:c09 is installed"
    other = kit.Card("other", bus="mdev")

    class Vfio(Bus):
        name = "mdev"

    registry.register_bus(Vfio())
    registry.register_parent(other)
    text = fails(errno.ENODEV, registry.create, "other-1")
    assert text.endswith(": no driver for mdev:c01 is installed (pip install mdevkit-vfio)")


def test_without_binding_the_device_stays_unbound(registry, taker, events):
    mdev = registry.create("card-1", bind=False)
    assert (mdev.state, mdev.driver, mdev.endpoint, taker.calls) == ("unbound", None, None, [])
    assert events(registry, mdev.name) == [("add", mdev.name)]
    registry.attach(mdev.uuid)
    assert (mdev.state, mdev.driver) == ("bound", "taker")


def test_the_most_telling_error_of_several_drivers(registry, two, taker, fails):
    two.on_probe = raiser(errno.EADDRINUSE, "the socket is taken")
    taker.on_probe = raiser(errno.ENODEV, "not mine")
    assert fails(errno.EADDRINUSE, registry.create, "card-1").endswith("driver better: probe failed: the socket is taken")
    two.on_probe, taker.on_probe = taker.on_probe, two.on_probe
    assert fails(errno.EADDRINUSE, registry.create, "card-1").endswith("driver taker: probe failed: the socket is taken")
    taker.on_probe = two.on_probe
    assert fails(errno.ENODEV, registry.create, "card-1").endswith("probe failed: not mine")


def test_a_bus_may_match_in_its_own_way(kit, card):
    class Any(Bus):
        name = "bench"

        @hookimpl
        def bus_match(self, device, driver):
            return driver.name == "lucky"

    with Registry([Any(), card, kit.Taker("lucky", ()), kit.Taker("able")]) as registry:
        assert registry.create("card-1").driver == "lucky"


@pytest.mark.parametrize("table", [None, "c01", {"c01"}, [b"c01"], ("c01", 1), iter(["c01"]), 7])
def test_an_id_table_that_buses_cannot_search_is_refused(registry, kit, fails, table):
    text = fails(errno.EINVAL, registry.register_driver, kit.Taker("odd", table))
    assert text.startswith("driver odd: its id table ")
    assert text.endswith(" is not a sequence of strings")
    registry.register_driver(kit.Taker("odd", ["c01"]))


@pytest.fixture
def unmatched(kit, card, taker):
    """A registry in which the first driver of the bus cannot be matched."""

    class Picky(Bus):
        name = "bench"

        @hookimpl
        def bus_match(self, device, driver):
            return device.match in driver.id_table or driver.broken

    broken = kit.Taker("aaa", ())
    with Registry([Picky(), card, taker, broken]) as registry:
        taker.broken = False
        yield registry


def test_a_driver_that_cannot_be_matched_keeps_nobody_from_the_others(unmatched, taker, caplog):
    mdev = unmatched.create("card-1")
    assert mdev.driver == "taker"
    reason = "match failed: AttributeError: 'Taker' object has no attribute 'broken'"
    assert f"driver aaa is passed over: {mdev}: {reason}" in caplog.text
    unmatched.unbind(mdev.uuid)
    unmatched.attach(mdev.uuid)
    assert mdev.driver == "taker"


def test_a_driver_that_cannot_be_matched_is_named_when_there_is_no_other(unmatched, card, taker, fails):
    card.class_id = 2
    text = fails(errno.EIO, unmatched.create, "card-1")
    assert text.startswith("driver aaa: device ")
    assert text.endswith(": match failed: AttributeError: 'Taker' object has no attribute 'broken'")
    unmatched.unregister_driver("bench", "aaa")
    assert "no driver for bench:c02 is installed" in fails(errno.ENODEV, unmatched.create, "card-1")


# -- bind and unbind by hand -------------------------------------------------------------------------------------------


def test_bind_and_unbind(registry, two, taker, events, fails):
    mdev = registry.create("card-1", bind=False)
    registry.bind(mdev.uuid, "taker")
    assert (mdev.driver, list(taker.held), mdev.endpoint.device_name) == ("taker", [mdev.name], mdev.name)
    assert fails(errno.EBUSY, registry.bind, mdev.uuid, "better") == f"{mdev} is bound to driver taker"
    assert fails(errno.EBUSY, registry.attach, mdev.uuid) == f"{mdev} is bound to driver taker"
    registry.unbind(mdev.uuid)
    assert (mdev.state, mdev.driver, mdev.endpoint, taker.held) == ("unbound", None, None, {})
    assert fails(errno.ENODEV, registry.unbind, mdev.uuid) == f"{mdev} is bound to no driver"
    assert events(registry, mdev.name, "DRIVER", "MODALIAS") == [
        ("add", mdev.name, None, "bench:c01"),
        ("bind", mdev.name, "taker", "bench:c01"),
        ("unbind", mdev.name, "taker", "bench:c01"),
    ]


def test_bind_without_a_match(registry, kit, fails):
    registry.register_driver(kit.Taker("other", ("c02",)))
    registry.register_driver(kit.Taker("foreign", ("c01",), "elsewhere"))
    mdev = registry.create("card-1", bind=False)
    text = fails(errno.ENODEV, registry.bind, mdev.uuid, "other")
    assert text == f"{mdev}: driver other does not match bench:c01; driver_override would make it"
    assert fails(errno.ENODEV, registry.bind, mdev.uuid, "foreign") == f"{mdev}: there is no driver foreign on bus bench"
    text = fails(errno.ENODEV, registry.bind, mdev.uuid, "foreign", override=True)
    assert text == f"{mdev}: there is no driver foreign on bus bench"
    assert (mdev.driver_override, mdev.state) == (None, "unbound")


def test_bind_with_an_override_keeps_it_only_if_it_works(registry, kit, fails):
    other = kit.Taker("other", ("c02",))
    registry.register_driver(other)
    mdev = registry.create("card-1", bind=False)
    other.on_probe = raiser(errno.EIO, "no")
    registry.set_driver_override(mdev.uuid, "taker")
    fails(errno.EIO, registry.bind, mdev.uuid, "other", override=True)
    assert mdev.driver_override == "taker"
    assert str(mdev.error) == f"{mdev}: driver other: probe failed: no"
    other.on_probe = raiser(517, "later")
    registry.bind(mdev.uuid, "other", override=True)
    assert (mdev.state, mdev.driver_override) == ("deferred", "other")
    other.on_probe = lambda device: None
    registry.attach(mdev.uuid)
    assert (mdev.driver, mdev.error) == ("other", None)


def test_an_override_of_a_bound_device_is_not_touched_by_a_bind_that_comes_late(registry, two, fails):
    mdev = registry.create("card-1")
    fails(errno.EBUSY, registry.bind, mdev.uuid, "taker", override=True)
    assert mdev.driver_override is None


def test_driver_override_lets_one_driver_bind(registry, two, kit, fails):
    other = kit.Taker("other", ("c02",))
    registry.register_driver(other)
    mdev = registry.create("card-1", driver_override="other")
    assert mdev.driver == "other"
    registry.unbind(mdev.uuid)
    assert fails(errno.ENODEV, registry.bind, mdev.uuid, "taker") == f"{mdev}: driver_override lets only other bind it, not taker"
    other.on_probe = raiser(errno.EIO, "no")
    fails(errno.EIO, registry.attach, mdev.uuid)
    assert mdev.state is State.UNBOUND, "the other drivers are not tried"
    registry.set_driver_override(mdev.uuid, "")
    registry.attach(mdev.uuid)
    assert (mdev.driver_override, mdev.driver) == (None, "better")


def test_an_override_that_names_nobody(registry, card, fails):
    text = fails(errno.ENODEV, registry.create, "card-1", driver_override="nobody")
    assert text.endswith(": there is no driver nobody on bus bench")
    assert card.alive == {}
    assert registry.create("card-1", driver_override="").driver == "taker", "empty is none, as in sysfs"


def test_an_override_is_set_between_probes_not_during_one(registry, taker, kit, thread):
    mdev = registry.create("card-1", bind=False)
    gate = taker.on_probe = kit.Gate()
    attaching = thread(registry.attach, mdev.uuid)
    gate.wait()
    setting = thread(registry.set_driver_override, mdev.uuid, "x")
    kit.until(lambda: mdev.lock._waiters)
    assert mdev.driver_override is None
    gate.open()
    attaching.result(kit.PATIENCE)
    setting.result(kit.PATIENCE)
    assert mdev.driver_override == "x"


@pytest.mark.parametrize("hook", ["on_probe", "on_remove", "on_let_go"])
def test_callbacks_about_the_same_device_are_told_so(registry, taker, fails, hook):
    """From inside its own transition a device cannot be bound, unbound or removed: that would wait for itself."""
    mdev = registry.create("card-1", bind=False)
    texts = set()

    def callback(device, *_):
        calls = [(registry.unbind,), (registry.remove,), (registry.attach,), (registry.bind, "taker")]
        texts.update(fails(errno.EDEADLK, call, device.uuid, *more) for call, *more in calls)
        assert registry.get(device.uuid) is device

    setattr(taker, hook, callback)
    registry.attach(mdev.uuid)
    registry.unbind(mdev.uuid)
    state = "probing" if hook == "on_probe" else "unbinding"
    assert texts == {f"{mdev} is {state} on this very thread"}


@pytest.mark.parametrize("hook", ["on_create", "on_probe"])
def test_callbacks_about_a_device_that_is_being_created(registry, card, taker, fails, hook):
    """It is not there yet, except to be told that it is being created."""
    texts = []

    def callback(mdev, *_):
        texts.append(fails(errno.ENODEV, registry.unbind, mdev.uuid))
        texts.append(fails(errno.EAGAIN, registry.remove, mdev.uuid))
        texts.append(fails(errno.EEXIST, registry.create, "card-2", uuid=mdev.uuid))

    setattr(card if hook == "on_create" else taker, hook, callback)
    mdev = registry.create("card-1")
    assert texts == [
        f"there is no device {mdev.name}",
        f"{mdev} is creating; try again",
        f"UUID {mdev.name} is in use by a device of type card-1 on parent card",
    ]


def test_an_interrupted_probe_leaves_the_device_as_it_was(registry, taker):
    mdev = registry.create("card-1", bind=False)

    def interrupt(device):
        raise KeyboardInterrupt

    taker.on_probe = interrupt
    for call in (registry.attach, lambda uuid: registry.bind(uuid, "taker", override=True)):
        with pytest.raises(KeyboardInterrupt):
            call(mdev.uuid)
        assert (mdev.state, mdev.driver_override) == ("unbound", None)
    taker.on_probe = lambda device: None
    registry.attach(mdev.uuid)
    assert mdev.state is State.BOUND


def test_an_interrupted_unbind_unbinds(registry, taker, events):
    mdev = registry.create("card-1")

    def interrupt(device):
        raise KeyboardInterrupt

    taker.on_remove = interrupt
    with pytest.raises(KeyboardInterrupt):
        registry.unbind(mdev.uuid)
    assert (mdev.state, mdev.driver) == ("unbound", None)
    assert events(registry, mdev.name)[-1] == ("unbind", mdev.name)


def test_failures_while_unbinding_are_logged_only(registry, taker, caplog):
    mdev = registry.create("card-1")
    taker.on_remove = raiser(errno.EIO, "stuck")
    registry.unbind(mdev.uuid)
    assert mdev.state is State.UNBOUND
    assert f"{mdev}: driver taker: remove failed: stuck" in caplog.text


def test_an_event_is_told_before_anybody_can_act_on_the_state_it_tells_of(registry, monkeypatch, thread, kit, events):
    """State and event change together: who sees the device bound and unbinds it must not be told of first."""
    mdev = registry.create("card-1", bind=False)
    emit, unbinding = registry.events.emit, []

    def slowly(action, subject, env):
        if action == "bind":
            unbinding.append(thread(registry.unbind, mdev.uuid))
            with pytest.raises(TimeoutError):
                unbinding[0].result(0.1)  # nothing tells that a thread waits for a lock
        return emit(action, subject, env)

    monkeypatch.setattr(registry.events, "emit", slowly)
    registry.attach(mdev.uuid)
    unbinding[0].result(kit.PATIENCE)
    assert [action for action, _ in events(registry, mdev.name)] == ["add", "bind", "unbind"]


# -- drivers that go ---------------------------------------------------------------------------------------------------


def test_unregistering_a_driver_unbinds_its_devices(registry, two, taker, events, fails):
    mdevs = [registry.create("card-1") for _ in range(3)]
    two.on_let_go = raiser(errno.EBUSY, "in use")  # it is not asked, it is told
    registry.unregister_driver("bench", "better")
    assert [mdev.state for mdev in mdevs] == ["unbound"] * 3
    assert (registry.drivers, two.held) == ([taker], {})
    assert fails(errno.ENODEV, registry.unregister_driver, "bench", "better") == "there is no driver better on bus bench"
    registry.attach(mdevs[0].uuid)
    assert mdevs[0].driver == "taker"
    registry.register_driver(two)


def test_a_driver_cannot_be_forgotten_while_it_probes(registry, taker, kit, thread):
    """It would be unknown when the device it has just bound is unbound."""
    mdev = registry.create("card-1", bind=False)
    gate = taker.on_probe = kit.Gate()
    attaching = thread(registry.attach, mdev.uuid)
    gate.wait()
    going = thread(registry.unregister_driver, "bench", "taker")
    kit.until(lambda: mdev.lock._waiters)
    assert registry.drivers == [taker]
    gate.open()
    attaching.result(kit.PATIENCE)
    going.result(kit.PATIENCE)
    assert (mdev.state, taker.held, registry.drivers) == ("unbound", {}, [])
    registry.remove(mdev.uuid)


def test_a_probe_that_fails_lets_the_driver_go(registry, taker, kit, thread):
    mdev = registry.create("card-1", bind=False)
    gate = kit.Gate()

    def probe(device):
        gate()
        raise OSError(errno.EIO, "no")

    taker.on_probe = probe
    attaching = thread(registry.attach, mdev.uuid)
    gate.wait()
    going = thread(registry.unregister_driver, "bench", "taker")
    kit.until(lambda: mdev.lock._waiters)
    gate.open()
    going.result(kit.PATIENCE)
    with pytest.raises(MdevError):
        attaching.result(kit.PATIENCE)
    assert registry.drivers == []


def test_a_driver_that_is_leaving_gets_no_new_device(registry, taker, kit, thread, fails):
    first = registry.create("card-1")
    gate = taker.on_remove = kit.Gate()
    going = thread(registry.unregister_driver, "bench", "taker")
    gate.wait()
    assert fails(errno.ENODEV, registry.create, "card-1").endswith(": driver taker is being unregistered")
    gate.open()
    going.result(kit.PATIENCE)
    assert (first.state, registry.drivers) == ("unbound", [])


def test_a_driver_does_not_leave_while_a_device_of_its_is_being_created(registry, card, taker, kit, thread, fails):
    """The device is bound and not yet there; unbinding it would break the create's promise."""
    entered = kit.Gate()

    class Slow(Bus):
        name = "slow"

        @hookimpl
        def bus_uevent(self, device):
            entered()
            return {}

    slow, driver = kit.Card("slow", bus="slow"), kit.Taker("slowtaker", bus="slow")
    registry.register_bus(Slow())
    registry.register_driver(driver)
    registry.register_parent(slow)
    creating = thread(registry.create, "slow-1")
    entered.wait()
    assert fails(errno.EAGAIN, registry.unregister_driver, "slow", "slowtaker").endswith(" is creating; try again")
    entered.open()
    mdev = creating.result(kit.PATIENCE)
    assert mdev.driver == "slowtaker"
    registry.unregister_driver("slow", "slowtaker")
    assert mdev.driver is None
    registry.unregister_parent("slow")


def test_a_driver_may_not_unregister_itself_from_its_probe(registry, taker, fails):
    mdev = registry.create("card-1", bind=False)
    texts = []
    taker.on_probe = lambda device: texts.append(fails(errno.EDEADLK, registry.unregister_driver, "bench", "taker"))
    registry.attach(mdev.uuid)
    assert texts == [f"{mdev} is probing on this very thread"]
    assert mdev.driver == "taker"


def test_a_device_that_found_another_driver_meanwhile_keeps_it(registry, two, taker, kit, thread):
    """Unregistering looks at a list of devices; one of them has since been unbound and bound to somebody else."""
    first, second = registry.create("card-1"), registry.create("card-1")
    gate = two.on_remove = kit.Gate()
    going = thread(registry.unregister_driver, "bench", "better")
    gate.wait()  # the first is being unbound, the second is on the list
    two.on_remove = lambda device: None
    registry.unbind(second.uuid)
    registry.attach(second.uuid)
    assert second.driver == "taker"
    gate.open()
    going.result(kit.PATIENCE)
    assert (first.driver, second.driver) == (None, "taker")


def test_the_core_unbinds_from_the_driver_that_is_meant(registry, fails):
    mdev = registry.create("card-1")
    text = fails(errno.ENODEV, registry._core.unbind, mdev, 0.0, True, "other")
    assert text == f"{mdev} is bound to driver taker, not to other"
    assert mdev.state is State.BOUND


# -- no lock is held while a plugin runs -------------------------------------------------------------------------------

HOOKS = ["create", "remove", "probe", "unbind", "let_go", "match", "uevent", "bus_probe", "bus_remove"]


class Asking(Bus):
    """A bus each of whose hooks can be made to ask."""

    name = "bench"

    def __init__(self):
        self.ask = {}

    @hookimpl
    def bus_match(self, device, driver):
        self.ask.get("match", str)()
        return device.match in driver.id_table

    @hookimpl
    def bus_uevent(self, device):
        self.ask.get("uevent", str)()
        return device.uevent()

    @hookimpl
    def bus_probe(self, device):
        self.ask.get("bus_probe", str)()

    @hookimpl
    def bus_remove(self, device):
        self.ask.get("bus_remove", str)()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_may_use_the_registry_from_another_thread(kit, card, taker, thread, hook):
    """It would hang if a lock of parent, device, driver core or table were held while the hook runs."""
    bus, asked = Asking(), threading.local()
    with Registry([bus, taker, card, kit.Card("side")]) as registry:
        neighbour = registry.create("side-1")
        own = registry.create("card-1")

        def work():
            asked.inside = True
            assert registry.mdevs
            made = registry.create("card-1")
            registry.unbind(made.uuid)
            registry.attach(made.uuid)
            registry.set_driver_override(neighbour.uuid, "taker")
            registry.unbind(neighbour.uuid)
            registry.bind(neighbour.uuid, "taker")
            registry.register_driver(kit.Taker("passing", ()))
            registry.unregister_driver("bench", "passing")
            registry.remove(made.uuid)

        rounds = []

        def ask(*_):
            if not getattr(asked, "inside", False):
                asked.inside = True
                thread(work).result(kit.PATIENCE)
                asked.inside = False
                rounds.append(hook)

        card.on_create = ask if hook == "create" else card.on_create
        card.on_remove = ask if hook == "remove" else card.on_remove
        taker.on_probe = ask if hook == "probe" else taker.on_probe
        taker.on_remove = ask if hook == "unbind" else taker.on_remove
        taker.on_let_go = ask if hook == "let_go" else taker.on_let_go
        bus.ask = {hook: ask}
        registry.unbind(own.uuid)
        registry.attach(own.uuid)
        registry.remove(registry.create("card-1").uuid)
        assert rounds
        bus.ask = {}


def test_plain_devices_and_removals_hold_no_lock_either(kit, card, taker, thread):
    bus = Asking()
    with Registry([bus, taker, card]) as registry:
        mdev = registry.create("card-1")
        bus.ask = {"uevent": lambda *_: thread(mdev.claim, State.PROBING, ()).result(kit.PATIENCE)}
        child = Device("child", "bench", mdev)
        registry.add_device(child)
        registry.del_device(child)
        bus.ask = {}
