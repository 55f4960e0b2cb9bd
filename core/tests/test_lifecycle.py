"""Rules 1 to 8 of the core, each forced: where an interleaving matters, a gate in a vendor's hook holds one thread still."""

from __future__ import annotations

import errno
import gc
import weakref
from uuid import uuid4

import pytest
from mdevkit import Bus, Device, Mdev, MdevError, Registry, State, hookimpl

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


class Interrupt(KeyboardInterrupt):
    """What Ctrl-C raises in whatever happens to run."""


def raiser(error):
    def hook(*arguments):
        raise error

    return hook


# -- rule 1: a UUID is unique from the start of its creation to the end of its release -------------------------------------


def test_a_uuid_is_taken_while_its_device_is_being_created(registry, card, kit, thread, fails):
    gate = card.on_create = kit.Gate()
    first = thread(registry.create, "card-1", uuid=UUID)
    gate.wait()
    text = fails(errno.EEXIST, registry.create, "card-2", uuid=UUID)
    assert text == f"UUID {UUID} is in use by a device of type card-1 on parent card"
    assert fails(errno.ENODEV, registry.get, UUID) == f"there is no device {UUID}"
    assert registry.mdevs == [], "nobody sees a device that may still fail"
    gate.open()
    assert first.result(kit.PATIENCE) is registry.get(UUID)
    fails(errno.EEXIST, registry.create, "card-2", uuid=UUID)


def test_a_uuid_is_taken_until_the_vendor_has_released_it(registry, card, kit, thread, fails):
    registry.create("card-1", uuid=UUID)
    gate = card.on_remove = kit.Gate()
    removing = thread(registry.remove, UUID)
    gate.wait()
    fails(errno.EEXIST, registry.create, "card-1", uuid=UUID)
    gate.open()
    removing.result(kit.PATIENCE)
    registry.create("card-1", uuid=UUID)


def test_a_uuid_is_unique_over_all_parents(kit, fails):
    with Registry([kit.Bus(), kit.Card("one"), kit.Card("two")]) as registry:
        registry.create("one-1", uuid=UUID, bind=False)
        text = fails(errno.EEXIST, registry.create, "two-1", uuid=UUID.upper(), bind=False)
        assert text == f"UUID {UUID} is in use by a device of type one-1 on parent one"


# -- rule 2: class id and ops once, together, inside create ----------------------------------------------------------------


def test_a_create_that_sets_no_class_fails_and_is_removed(registry, card, fails, events):
    card.class_id = 0
    text = fails(errno.EINVAL, registry.create, "card-1", uuid=UUID)
    assert text == f"device {UUID}: parent card set no class and ops in its create"
    assert card.calls == [("create", UUID), ("remove", UUID)]
    assert events(registry, UUID) == []


def test_a_second_class_is_refused(registry, card, fails):
    refused = []
    card.on_create = lambda mdev, params: (mdev._set_class(1, card), refused.append(fails(errno.EBUSY, mdev._set_class, 2, card)))
    text = fails(errno.EBUSY, registry.create, "card-1", uuid=UUID)  # the card's own setting is the third
    assert text == refused[0] == f"device {UUID}: class id and ops are already set (class id 1)"


@pytest.mark.parametrize(
    ("class_id", "ops", "text"),
    [
        (0, "ops", "class id 0 is not between 1 and 65535"),
        (-1, "ops", "class id -1 is not between 1 and 65535"),
        (65536, "ops", "class id 65536 is not between 1 and 65535"),
        (1, None, "no ops were given with class id 1"),
    ],
)
def test_a_class_that_cannot_be(registry, card, class_id, ops, text, fails):
    card.on_create = lambda mdev, params: mdev._set_class(class_id, ops)
    assert fails(errno.EINVAL, registry.create, "card-1", uuid=UUID) == f"device {UUID}: {text}"


def test_a_class_outside_create(registry, card, fails):
    mdev = registry.create("card-1")
    assert "already set" in fails(errno.EBUSY, mdev._set_class, 1, card)
    stray = Mdev(uuid4(), mdev.type, {})
    stray.settle(State.UNBOUND)
    assert fails(errno.EINVAL, stray._set_class, 1, card) == f"{stray}: class id and ops can be set inside create only"


def test_a_getter_for_another_class(registry, card, fails):
    mdev = registry.create("card-1")
    assert mdev._get_ops(1) is card
    assert fails(errno.EINVAL, mdev._get_ops, 2) == f"{mdev} has class id 1, not 2"


@pytest.mark.parametrize(("class_id", "alias"), [(1, "c01"), (0x1F, "c1F"), (0xFFFF, "cFFFF")])
def test_aliases_are_written_as_modpost_does(registry, card, class_id, alias):
    card.class_id = class_id
    assert registry.create("card-1", bind=False).modalias == f"bench:{alias}"


# -- rule 3: create is atomic ----------------------------------------------------------------------------------------------


def nothing_left(registry, card, taker, events):
    assert registry.mdevs == []
    assert (registry._uuids, card.alive, card.pool.holders, taker.held) == ({}, {}, {}, {})
    assert card.pool.free == card.pool.capacity
    assert events(registry) == [("change", "card")], "no ADD is seen"
    assert registry._core._taken["bench", "taker"] == {}
    card.on_create = taker.on_probe = lambda *_: None
    registry.create("card-1", uuid=UUID)  # and the UUID is free again
    registry.remove(UUID)


FAILURES = [
    (OSError(errno.ENOMEM, "no memory on the card"), errno.ENOMEM, "no memory on the card"),
    (MdevError(errno.EPERM, "not today"), errno.EPERM, "not today"),
    (ZeroDivisionError("oops"), errno.EIO, "ZeroDivisionError: oops"),
    (SystemExit(4), errno.EIO, "SystemExit: 4"),
]


@pytest.mark.parametrize(("raised", "number", "text"), FAILURES)
@pytest.mark.parametrize("where", ["vendor", "driver"])
def test_a_failed_create_leaves_nothing(registry, card, taker, events, fails, where, raised, number, text):
    if where == "vendor":
        card.on_create = raiser(raised)
    else:
        taker.on_probe = raiser(raised)
    assert text in fails(number, registry.create, "card-1", uuid=UUID)
    assert card.calls == [("create", UUID)] + [("remove", UUID)] * (where == "driver")
    nothing_left(registry, card, taker, events)


@pytest.mark.parametrize("where", ["vendor", "driver"])
def test_an_interrupted_create_leaves_nothing(registry, card, taker, events, where):
    setattr(card if where == "vendor" else taker, "on_create" if where == "vendor" else "on_probe", raiser(Interrupt()))
    with pytest.raises(Interrupt):
        registry.create("card-1", uuid=UUID)
    nothing_left(registry, card, taker, events)


class Touchy(Bus):
    """A bus whose hooks fail as the test wants, and that has drivers and vendors undone properly."""

    name = "bench"

    def __init__(self):
        self.fail = {}
        self.prepared = []

    def _do(self, what):
        if what in self.fail:
            raise self.fail[what]

    @hookimpl
    def bus_match(self, device, driver):
        self._do("match")
        return device.match in driver.id_table

    @hookimpl
    def bus_uevent(self, device):
        self._do("uevent")
        return device.uevent()

    @hookimpl
    def bus_probe(self, device, driver):
        self._do("probe")
        self.prepared.append(device.name)

    @hookimpl
    def bus_remove(self, device):
        self.prepared.remove(device.name)
        self._do("remove")


@pytest.fixture
def touchy():
    return Touchy()


@pytest.fixture
def fragile(touchy, card, taker):
    with Registry([touchy, taker, card], remove_timeout=0.05) as made:
        yield made
        touchy.fail.clear()
    assert not touchy.prepared
    assert not card.alive


@pytest.mark.parametrize("what", ["match", "probe"])
def test_a_failing_bus_fails_the_create(fragile, touchy, card, taker, events, fails, what):
    touchy.fail[what] = ValueError("odd")
    assert fails(errno.EIO, fragile.create, "card-1", uuid=UUID).endswith(f"{what} failed: ValueError: odd")
    touchy.fail.clear()
    nothing_left(fragile, card, taker, events)


def test_a_failed_probe_is_undone_on_the_bus(fragile, touchy, taker, fails):
    taker.on_probe = raiser(OSError(errno.EADDRINUSE, "Address already in use"))
    text = fails(errno.EADDRINUSE, fragile.create, "card-1", uuid=UUID)
    assert text == f"device {UUID}: driver taker: probe failed: Address already in use"
    assert touchy.prepared == []


@pytest.mark.parametrize("what", ["uevent", "match", "probe"])
def test_an_interrupt_in_a_bus_leaves_nothing(fragile, touchy, card, taker, events, what):
    """Also in the last hook before the device is there, when the driver has it already."""
    touchy.fail[what] = Interrupt()
    with pytest.raises(Interrupt):
        fragile.create("card-1", uuid=UUID)
    touchy.fail.clear()
    assert touchy.prepared == []
    nothing_left(fragile, card, taker, events)


def test_a_bus_that_cannot_tell_an_event_stops_nothing(fragile, touchy, events, caplog):
    touchy.fail["uevent"] = ValueError("odd")
    fragile.create("card-1", uuid=UUID)
    fragile.remove(UUID)
    assert [action for action, _ in events(fragile, UUID)] == ["add", "bind", "unbind", "remove"]
    assert "uevent failed: ValueError: odd" in caplog.text


def test_a_device_class_that_cannot_be_made(kit, card, fails):
    class Broken(Mdev):
        def __init__(self, *arguments):
            raise ZeroDivisionError("oops")

    class BrokenBus(Bus):
        name, device_class = "bench", Broken

    with Registry([BrokenBus(), card]) as registry:
        assert fails(errno.EIO, registry.create, "card-1") == "type card-1: create failed: ZeroDivisionError: oops"
        registry.unregister_parent("card")  # nobody is thought to be still creating


def test_a_device_class_whose_match_fails(kit, card, taker, events, fails):
    class Odd(Mdev):
        broken = False

        @property
        def match(self):
            if self.broken:
                raise ZeroDivisionError("oops")
            return super().match

    class OddBus(Bus):
        name, device_class = "bench", Odd

    with Registry([OddBus(), card, taker]) as registry:
        Odd.broken = True
        assert fails(errno.EIO, registry.create, "card-1", uuid=UUID) == f"device {UUID}: match failed: ZeroDivisionError: oops"
        Odd.broken = False
        nothing_left(registry, card, taker, events)
        mdev = registry.create("card-1", bind=False)
        Odd.broken = True
        fails(errno.EIO, registry.attach, mdev.uuid)
        assert mdev.state is State.UNBOUND
        Odd.broken = False


def test_parameters_are_checked_before_anything_is_taken(registry, card, fails):
    assert fails(errno.EINVAL, registry.create, "card-1", params={"speed": "11"}) == "attribute speed: 11 is not between 0 and 9"
    text = fails(errno.ENOENT, registry.create, "card-1", params={"colour": "red"})
    assert text == "type card-1 has no attribute 'colour' (there are: speed, mode)"
    assert fails(errno.EINVAL, registry.create, "card-1", uuid="x") == "'x' is not a UUID (8-4-4-4-12 hex digits)"
    assert card.calls == []


def test_the_vendor_finds_checked_parameters_and_defaults(registry, card):
    seen = []
    card.on_create = lambda mdev, params: seen.append(dict(params))
    registry.create("card-1", params={"mode": "slow"})
    assert seen == [{"speed": 3, "mode": "slow"}]


def test_a_wrapper_may_refuse_a_create_it_does_not_own(kit, card, taker, events, fails):
    """A quota: refuses before the vendor knows, and counts by the two hooks it wraps."""

    class Quota:
        def __init__(self):
            self.used = 0

        @hookimpl(wrapper=True)
        def parent_create(self, mdev):
            if self.used == 2:
                raise MdevError(errno.EDQUOT, f"{mdev}: the quota of 2 devices is used up", mdev)
            answer = yield
            self.used += 1
            return answer

        @hookimpl(wrapper=True)
        def parent_remove(self):
            answer = yield
            self.used -= 1
            return answer

    quota = Quota()
    with Registry([quota, kit.Bus(), taker, card]) as registry:
        mdevs = [registry.create("card-1") for _ in range(2)]
        assert fails(errno.EDQUOT, registry.create, "card-1", uuid=UUID) == f"device {UUID}: the quota of 2 devices is used up"
        assert (UUID not in dict(card.calls).values(), len(card.alive), card.pool.free) == (True, 2, 6)
        registry.remove(mdevs[0].uuid)
        registry.create("card-1")
        assert quota.used == 2
    assert quota.used == 0


def test_a_wrapper_that_fails_late_does_not_break_atomicity(kit, card, taker, events, fails):
    """Fault injection behind the owner's back: vendor and driver have done their part and are told to undo it."""

    class Fault:
        hook = None

        @hookimpl(wrapper=True)
        def parent_create(self):
            return (yield from self._fail("parent_create"))

        @hookimpl(wrapper=True)
        def driver_probe(self):
            return (yield from self._fail("driver_probe"))

        def _fail(self, hook):
            answer = yield
            if hook == self.hook:
                raise MdevError(errno.EIO, "injected")
            return answer

    fault = Fault()
    with Registry([fault, kit.Bus(), taker, card]) as registry:
        for fault.hook in ("parent_create", "driver_probe"):
            assert fails(errno.EIO, registry.create, "card-1") == "injected"
            assert (card.alive, taker.held, card.pool.free) == ({}, {}, 8)
        fault.hook = None
        nothing_left(registry, card, taker, events)


def test_children_a_failed_driver_left_behind_are_taken_away(registry, card, taker, fails, caplog):
    def probe(device):
        if isinstance(device, Mdev):
            registry.add_device(Device("child", "bench", device))
            raise OSError(errno.EIO, "and then it failed")

    taker.on_probe = probe
    for _ in range(2):  # the name is free again
        fails(errno.EIO, registry.create, "card-1")
    assert registry._core.devices == []
    assert "device child is still there while" in caplog.text


# -- rule 4: remove unbinds, calls the vendor, releases --------------------------------------------------------------------


def test_the_order_of_a_removal(registry, card, taker, events):
    order = []
    mdev = registry.create("card-2", uuid=UUID)
    taker.on_let_go = lambda device, timeout, force: order.append(("let go", timeout, force))
    taker.on_remove = lambda device: order.append(("driver", device.state, card.pool.free))
    card.on_remove = lambda mdev: order.append(("vendor", mdev.driver, mdev.endpoint, card.pool.free))
    registry.remove(UUID)
    assert order == [("let go", 0.05, False), ("driver", "removing", 6), ("vendor", None, None, 6)]
    assert (card.pool.free, mdev.state) == (8, "gone")
    assert events(registry, UUID, "DRIVER") == [
        ("add", UUID, None),
        ("bind", UUID, "taker"),
        ("unbind", UUID, "taker"),
        ("remove", UUID, None),
    ]


def test_a_second_remove_while_one_runs(registry, card, kit, thread, fails):
    registry.create("card-1", uuid=UUID)
    gate = card.on_remove = kit.Gate()
    removing = thread(registry.remove, UUID)
    gate.wait()
    assert fails(errno.EAGAIN, registry.remove, UUID) == f"device {UUID} is removing; try again"
    assert fails(errno.EAGAIN, registry.unbind, UUID) == f"device {UUID} is removing; try again"
    assert fails(errno.EAGAIN, registry.set_driver_override, UUID, "x") == f"device {UUID} is removing; try again"
    gate.open()
    removing.result(kit.PATIENCE)
    assert fails(errno.ENODEV, registry.remove, UUID) == f"there is no device {UUID}"


def test_a_remove_while_the_device_is_created(registry, card, kit, thread, fails):
    gate = card.on_create = kit.Gate()
    creating = thread(registry.create, "card-1", uuid=UUID)
    gate.wait()
    assert fails(errno.EAGAIN, registry.remove, UUID) == f"device {UUID} is creating; try again"
    gate.open()
    creating.result(kit.PATIENCE)


def test_a_device_in_use_stays_as_it_was(registry, card, taker, events, fails):
    mdev = registry.create("card-1", uuid=UUID)
    taker.on_let_go = raiser(MdevError(errno.EBUSY, f"device {UUID} is in use by pid 42"))
    assert fails(errno.EBUSY, registry.remove, UUID) == f"device {UUID} is in use by pid 42"
    assert fails(errno.EBUSY, registry.unbind, UUID) == f"device {UUID} is in use by pid 42"
    assert (mdev.state, mdev.driver, list(taker.held)) == ("bound", "taker", [UUID])
    assert [action for action, _ in events(registry, UUID)] == ["add", "bind"]
    registry.remove(UUID, force=True)
    assert mdev.state is State.GONE


def test_the_time_a_user_gets(registry, taker):
    asked = []
    taker.on_let_go = lambda device, timeout, force: asked.append((timeout, force))
    registry.create("card-1", uuid=UUID)
    registry.unbind(UUID, timeout=3)
    registry.attach(UUID)
    registry.remove(UUID, timeout=0.5, force=True)
    registry.create("card-1")
    registry.unregister_parent("card")
    assert asked == [(3, False), (0.5, True), (0.0, True)]


@pytest.mark.parametrize("who", ["driver", "vendor"])
def test_nobody_can_refuse_a_removal(registry, card, taker, who, caplog):
    (taker if who == "driver" else card).on_remove = raiser(OSError(errno.EBUSY, "no"))
    mdev = registry.create("card-1")
    registry.remove(mdev.uuid)
    assert mdev.state is State.GONE
    assert "remove failed: no" in caplog.text


@pytest.mark.parametrize("who", ["let_go", "driver", "bus", "vendor"])
def test_an_interrupted_removal_is_whole_or_none(fragile, touchy, card, taker, who, events):
    mdev = fragile.create("card-1", uuid=UUID)
    if who == "let_go":
        taker.on_let_go = raiser(Interrupt())
    elif who == "bus":
        touchy.fail["remove"] = Interrupt()
    else:
        (taker if who == "driver" else card).on_remove = raiser(Interrupt())
    with pytest.raises(Interrupt):
        fragile.remove(UUID)
    touchy.fail.clear()
    taker.on_let_go = taker.on_remove = card.on_remove = lambda *_: None
    if who == "let_go":
        assert (mdev.state, mdev.driver) == ("bound", "taker")
        fragile.remove(UUID)
    assert (mdev.state, card.alive, taker.held, card.pool.free, touchy.prepared) == ("gone", {}, {}, 8, [])
    assert [action for action, _ in events(fragile, UUID)] == ["add", "bind", "unbind", "remove"]
    fragile.create("card-1", uuid=UUID)


def test_a_remove_waits_for_a_probe_of_somebody_else(registry, taker, kit, thread):
    mdev = registry.create("card-1", bind=False)
    gate = taker.on_probe = kit.Gate()
    attaching = thread(registry.attach, mdev.uuid)
    gate.wait()
    removing = thread(registry.remove, mdev.uuid)
    kit.until(lambda: mdev.lock._waiters)
    assert mdev.state is State.PROBING
    gate.open()
    attaching.result(kit.PATIENCE)
    removing.result(kit.PATIENCE)
    assert (mdev.state, taker.held) == ("gone", {})


# -- rule 5: a parent that unregisters -------------------------------------------------------------------------------------


def test_a_leaving_parent_refuses_newcomers_and_waits_for_running_creates(registry, card, kit, thread, fails):
    there = registry.create("card-1")
    gate = card.on_create = kit.Gate()
    creating = thread(registry.create, "card-1", uuid=UUID)
    gate.wait()
    leaving = thread(registry.unregister_parent, "card")
    kit.until(lambda: registry.parent("card").leaving)
    assert fails(errno.ENODEV, registry.create, "card-1") == "parent card is being unregistered"
    assert fails(errno.ENODEV, registry.remove, there.uuid) == "parent card is being unregistered"
    assert fails(errno.ENODEV, registry.unregister_parent, "card") == "parent card is being unregistered"
    assert not leaving.done()
    assert there.state is State.BOUND, "nothing is removed while a create runs"
    gate.open()
    late = creating.result(kit.PATIENCE)
    leaving.result(kit.PATIENCE)
    assert (there.state, late.state, registry.parents) == ("gone", "gone", [])
    assert card.calls[-3:] == [("remove", UUID), ("remove", there.name), ("unregister", "card")]


def test_a_parent_does_not_leave_under_a_running_remove(registry, card, kit, thread):
    mdev = registry.create("card-1")
    gate = card.on_remove = kit.Gate()
    removing = thread(registry.remove, mdev.uuid)
    gate.wait()
    leaving = thread(registry.unregister_parent, "card")
    kit.until(lambda: registry.parent("card").leaving)
    assert not leaving.done()
    gate.open()
    removing.result(kit.PATIENCE)
    leaving.result(kit.PATIENCE)
    assert card.calls.count(("remove", mdev.name)) == 1


def test_a_leaving_parent_forces_and_nobody_stops_it(registry, card, taker, caplog):
    def let_go(device, timeout, force):
        if not force:
            raise MdevError(errno.EBUSY, "in use by pid 42")

    taker.on_let_go = let_go
    card.on_unregister = raiser(OSError(errno.EIO, "the card is on fire"))
    mdev = registry.create("card-1")
    registry.unregister_parent("card")
    assert (mdev.state, registry.parents) == ("gone", [])
    assert "the card is on fire" in caplog.text


@pytest.mark.parametrize("hook", ["on_create", "on_remove"])
def test_a_parent_cannot_leave_from_inside_its_own_hooks(registry, card, hook, fails):
    texts = []
    setattr(card, hook, lambda *_: texts.append(fails(errno.EDEADLK, registry.unregister_parent, "card")))
    registry.remove(registry.create("card-1").uuid)
    assert len(texts) == 1
    assert texts[0].startswith("parent card cannot be unregistered from inside ")


def test_a_parent_cannot_leave_from_inside_a_probe_of_its_device(registry, taker, fails):
    mdev = registry.create("card-1", bind=False)
    texts = []
    taker.on_probe = lambda device: texts.append(fails(errno.EDEADLK, registry.unregister_parent, "card"))
    registry.attach(mdev.uuid)
    assert texts == ["parent card cannot be unregistered from inside a call to one of its devices"]


def test_an_interrupted_departure_can_be_repeated(registry, card, taker):
    mdevs = [registry.create("card-1") for _ in range(3)]
    taker.on_remove = raiser(Interrupt())
    with pytest.raises(Interrupt):
        registry.unregister_parent("card")
    taker.on_remove = lambda *_: None
    assert [mdev.state for mdev in mdevs] == ["bound", "bound", "gone"]
    registry.create("card-1")
    registry.unregister_parent("card")
    assert all(mdev.state is State.GONE for mdev in mdevs)


def test_a_leaving_parent_is_passed_over_when_another_will_do(kit):
    one, two = kit.Card("one", driver_name="card"), kit.Card("two", driver_name="card")
    with Registry([kit.Bus(), one, two]) as registry:
        made = []
        one.on_unregister = lambda parent: made.append(registry.create("card-1", bind=False))
        registry.unregister_parent("one")
        assert [mdev.parent.name for mdev in made] == ["two"]


def test_the_next_parent_gets_a_create_that_lost_the_last_instance(kit, thread):
    """Both see room on the first card; the loser must not be told ENOSPC while the second card is empty."""
    one, two = kit.Card("one", 1, driver_name="card"), kit.Card("two", 1, driver_name="card")

    class Late(Bus):
        name = "bench"

    with Registry([Late(), one, two]) as registry:
        look, raced = registry._types, []

        def types(*arguments):
            found = look(*arguments)
            if not raced:
                raced.append(None)
                raced.append(thread(registry.create, "card-1", bind=False).result(kit.PATIENCE))
            return found

        registry._types = types
        mdev = registry.create("card-1", bind=False)
        assert (raced[1].parent.name, mdev.parent.name) == ("one", "two")


# -- rule 6: available_instances -------------------------------------------------------------------------------------------


def test_instances_are_counted_from_the_beginning_of_create_to_the_end_of_remove(registry, card, kit, thread):
    two = registry.type("card-2")
    gate = card.on_create = kit.Gate()
    creating = thread(registry.create, "card-2", uuid=UUID)
    gate.wait()
    assert two.available_instances == 3
    gate.open()
    creating.result(kit.PATIENCE)
    gate = card.on_remove = kit.Gate()
    removing = thread(registry.remove, UUID)
    gate.wait()
    assert two.available_instances == 3
    gate.open()
    removing.result(kit.PATIENCE)
    assert two.available_instances == 4


def test_an_empty_pool_says_who_holds_it(registry, fails):
    mdevs = [registry.create("card-2") for _ in range(4)]
    text = fails(errno.ENOSPC, registry.create, "card-1")
    held = ", ".join(f"{mdev.name} holds 2" for mdev in mdevs)
    assert text == f"type card-1: no instance available: 1 of 8 ports wanted, 0 free ({held})"


# -- rule 7: errors --------------------------------------------------------------------------------------------------------


def test_an_error_carries_its_object(registry, card):
    for where, subject in (("create", "device"), ("full", "type")):
        if where == "full":
            card.on_create = lambda *_: None
            for _ in range(8):
                registry.create("card-1")
        else:
            card.on_create = raiser(OSError(errno.EIO, "no"))
        with pytest.raises(MdevError) as caught:
            registry.create("card-1")
        assert str(caught.value.subject).startswith(subject)


def test_the_vendors_exception_is_the_cause(registry, card):
    card.on_create = raiser(ZeroDivisionError("oops"))
    with pytest.raises(MdevError) as caught:
        registry.create("card-1")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# -- rule 8 and what is left of a device -----------------------------------------------------------------------------------


def test_a_removed_device_is_freed_at_once(registry):
    """Without the garbage collector: a host with ten thousand devices must not wait for it."""
    gc.collect()
    gc.disable()
    try:
        mdev = registry.create("card-1")
        registry.unbind(mdev.uuid)
        registry.attach(mdev.uuid)
        registry.suspend(mdev.uuid)
        registry.resume(mdev.uuid)
        registry.remove(mdev.uuid)
        gone = weakref.ref(mdev)
        del mdev
        assert gone() is None
    finally:
        gc.enable()


def test_what_a_failed_probe_had_in_hand_is_not_kept(registry, kit, taker):
    """A device that waits in the deferred state for days must not keep the frames of its failed probe alive."""

    class Resource:
        pass

    kept = []

    def probe(device):
        resource = Resource()
        kept.append(weakref.ref(resource))
        raise OSError(517, "the clock is missing")

    taker.on_probe = probe
    mdev = registry.create("card-1")
    gc.collect()  # pluggy's frame and the error that passed through it hold each other
    assert (str(mdev.error), mdev.error.errno) == (f"{mdev}: driver taker: probe failed: the clock is missing", 517)
    assert [resource() for resource in kept] == [None]
    taker.on_probe = lambda device: None
    registry.attach(mdev.uuid)
    assert mdev.error is None


def test_a_create_that_failed_keeps_nothing_alive(registry, card):
    seen = []

    def create(mdev, params):
        seen.append(weakref.ref(mdev))
        raise OSError(errno.EIO, "no")

    card.on_create = create
    with pytest.raises(MdevError):
        registry.create("card-1")
    gc.collect()
    assert seen[0]() is None
