"""Random lives of devices against a model that knows nothing of threads, locks or hooks: it is written from the rules.

The model keeps plain facts and, for every operation, says either which errno it fails with or how the facts change. After
each step registry, vendors, drivers and the event log must all agree with it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from mdevkit import Bus, Driver, MdevError, MdevType, ParentOps, Pool, Registry, hookimpl

LATER = 517

#: What a driver's probe does.
MOODS = {"willing": 0, "later": LATER, "broken": errno.EIO, "not mine": errno.ENODEV}

UUIDS = [UUID(int=0x40008000000000000000 + number) for number in range(9)]
ANY_UUID = st.sampled_from(UUIDS)
PARENT = st.sampled_from(["one", "two"])
BUS = st.sampled_from(["left", "right"])
DRIVER = st.sampled_from(["alpha", "beta", "gamma"])
MOOD = st.sampled_from(sorted(MOODS))


# -- the plugins -------------------------------------------------------------------------------------------------------


class LeftBus(Bus):
    name = "left"


class RightBus(Bus):
    name = "right"


class Vendor(ParentOps):
    """Types are named <bus>-<class id>; six ports are shared by all of them, and a device of class 2 takes two."""

    def __init__(self, name):
        self.name = name
        self.pool = Pool("ports", 6)
        self.types = [
            MdevType(f"{bus}-{class_id}", bus, "x", costs={self.pool: class_id}) for bus in ("left", "right") for class_id in (1, 2)
        ]
        self.alive = set()
        self.mood = 0

    @hookimpl
    def parent_create(self, mdev):
        if self.mood:
            raise OSError(self.mood, "the vendor's mood")
        self.alive.add(mdev.uuid)
        mdev._set_class(int(mdev.type.group[-1]), self)

    @hookimpl
    def parent_remove(self, mdev):
        self.alive.remove(mdev.uuid)


class Moody(Driver):
    def __init__(self, name, bus, id_table):
        self.name, self.bus, self.id_table = name, bus, id_table
        self.mood, self.stubborn = 0, False
        self.held = set()

    @hookimpl
    def driver_probe(self, device):
        if self.mood:
            raise OSError(self.mood, "the driver's mood")
        assert device.uuid not in self.held
        self.held.add(device.uuid)
        return self

    @hookimpl
    def driver_remove(self, device):
        self.held.remove(device.uuid)

    @hookimpl
    def driver_let_go(self, device, timeout, force):
        if self.stubborn and not force:
            raise MdevError(errno.EBUSY, f"{device} is in use")


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass
class Facts:
    """What the model knows about one device."""

    parent: str
    bus: str
    class_id: int
    state: str = "unbound"
    driver: str | None = None
    override: str | None = None
    asleep: bool = False


@dataclass
class Model:
    """`drivers` holds the very plugins, for their mood and id table; the model never calls them."""

    devices: dict = field(default_factory=dict)
    parents: dict = field(default_factory=dict)
    sleeping_parents: set = field(default_factory=set)
    asleep: bool = False
    drivers: dict = field(default_factory=dict)

    def free(self, parent):
        return 6 - sum(device.class_id for device in self.devices.values() if device.parent == parent)

    def sleeps(self, device):
        return self.asleep or device.asleep or device.parent in self.sleeping_parents

    def willing(self, device):
        """Return who would be tried, in order; an override that names nobody leaves nobody."""
        here = {name: driver for (bus, name), driver in sorted(self.drivers.items()) if bus == device.bus}
        if device.override is not None:
            return [here[device.override]] if device.override in here else []
        return [driver for driver in here.values() if f"c{device.class_id:02X}" in driver.id_table]

    def probe(self, device, drivers):
        """Return the driver that takes the device, or the errno of nobody taking it."""
        if drivers and self.sleeps(device):
            return LATER
        moods = []
        for driver in drivers:
            if not driver.mood:
                return driver.name
            moods.append(driver.mood)
        if LATER in moods:
            return LATER
        serious = [mood for mood in moods if mood != errno.ENODEV]
        return serious[-1] if serious else errno.ENODEV

    def settle(self, device, outcome, otherwise):
        """Apply an outcome of `probe`; returns the errno the caller sees, 0 for none."""
        if isinstance(outcome, str):
            device.state, device.driver = "bound", outcome
            self.wake()
            return 0
        device.state = "deferred" if outcome == LATER else otherwise
        return 0 if outcome == LATER else outcome

    def wake(self):
        for device in self.devices.values():
            if device.state == "deferred":
                outcome = self.probe(device, self.willing(device))
                if isinstance(outcome, str):
                    device.state, device.driver = "bound", outcome
                elif outcome != LATER:
                    device.state = "unbound"

    def release(self, device):
        device.state, device.driver, device.asleep = "unbound", None, False

    def held(self, device):
        return device.driver is not None and self.drivers[device.bus, device.driver].stubborn


class Machine(RuleBasedStateMachine):
    """What both machines do: devices come, are bound, unbound and go."""

    def __init__(self):
        super().__init__()
        self.model = Model()
        self.vendors = {name: Vendor(name) for name in ("one", "two")}
        self.registry = Registry([LeftBus(), RightBus()])
        self.reader = self.registry.events.subscribe(0)
        #: What the events alone tell: UUID to driver.
        self.told = {}

    def expect(self, number, call, *arguments, **keywords):
        """Make a call that must fail with an errno, or succeed if that is 0."""
        try:
            call(*arguments, **keywords)
            found = None
        except MdevError as error:
            found = error
        assert (found.errno if found else 0) == number, f"{found!r}, not {errno.errorcode.get(number, number)}"
        assert found is None or (str(found) and found.subject is not None)

    def register(self, name):
        self.registry.register_parent(self.vendors[name])
        self.model.parents[name] = self.vendors[name]

    def add_driver(self, driver):
        self.registry.register_driver(driver)
        self.model.drivers[driver.bus, driver.name] = driver

    def create_expecting(self, parent, bus, class_id, uuid, bind, override=None):
        model = self.model
        device = Facts(parent, bus, class_id, override=override)
        if parent not in model.parents:
            number = errno.ENODEV
        elif uuid in model.devices:
            number = errno.EEXIST
        elif model.free(parent) < class_id:
            number = errno.ENOSPC
        elif model.parents[parent].mood:
            number = model.parents[parent].mood
        else:
            outcome = model.probe(device, model.willing(device)) if bind else None
            number = 0 if outcome is None or outcome == LATER or isinstance(outcome, str) else outcome
            if not number:
                model.devices[uuid] = device
                if outcome is not None:
                    model.settle(device, outcome, "unbound")
        type_id = f"{parent}-{bus}-{class_id}"
        self.expect(number, self.registry.create, type_id, uuid=uuid, parent=parent, bind=bind, driver_override=override)

    # -- operations that both machines have ----------------------------------------------------------------------------

    @rule(uuid=ANY_UUID, force=st.booleans())
    def remove(self, uuid, force):
        device = self.model.devices.get(uuid)
        if device is None:
            number = errno.ENODEV
        elif self.model.held(device) and not force:
            number = errno.EBUSY
        else:
            number = 0
            del self.model.devices[uuid]
        self.expect(number, self.registry.remove, uuid, force=force)

    @rule(uuid=ANY_UUID)
    def attach(self, uuid):
        device = self.model.devices.get(uuid)
        if device is None:
            number = errno.ENODEV
        elif device.state == "bound":
            number = errno.EBUSY
        else:
            number = self.model.settle(device, self.model.probe(device, self.model.willing(device)), "unbound")
        self.expect(number, self.registry.attach, uuid)

    @rule(uuid=ANY_UUID, name=st.sampled_from(["alpha", "beta", "gamma", "nobody"]), override=st.booleans())
    def bind(self, uuid, name, override):
        device = self.model.devices.get(uuid)
        driver = device and self.model.drivers.get((device.bus, name))
        if driver is None or not (override or driver in self.model.willing(device)):
            number = errno.ENODEV
        elif device.state == "bound":
            number = errno.EBUSY
        else:
            outcome = self.model.probe(device, [driver])
            if override and (outcome == LATER or isinstance(outcome, str)):
                device.override = name
            number = self.model.settle(device, outcome, device.state)
        self.expect(number, self.registry.bind, uuid, name, override=override)

    @rule(uuid=ANY_UUID, force=st.booleans())
    def unbind(self, uuid, force):
        device = self.model.devices.get(uuid)
        if device is None or device.state != "bound":
            number = errno.ENODEV
        elif self.model.held(device) and not force:
            number = errno.EBUSY
        else:
            number = 0
            self.model.release(device)
        self.expect(number, self.registry.unbind, uuid, force=force)

    @rule(uuid=ANY_UUID, name=st.sampled_from([None, "", "alpha", "beta", "gamma", "nobody"]))
    def override(self, uuid, name):
        device = self.model.devices.get(uuid)
        if device is not None:
            device.override = name or None
        self.expect(0 if device else errno.ENODEV, self.registry.set_driver_override, uuid, name)

    # -- what must hold after every step -------------------------------------------------------------------------------

    @invariant()
    def registry_is_as_the_model_says(self):
        there = {mdev.uuid: mdev for mdev in self.registry.mdevs}
        assert there.keys() == self.model.devices.keys()
        for uuid, device in self.model.devices.items():
            mdev = there[uuid]
            assert (mdev.state, mdev.driver, mdev.driver_override) == (device.state, device.driver, device.override), mdev.error
            assert (mdev.parent.name, mdev.class_id, mdev.suspended) == (device.parent, device.class_id, device.asleep)
            assert (mdev.endpoint is not None) == (device.driver is not None)

    @invariant()
    def vendors_and_drivers_hold_what_the_model_says(self):
        devices = self.model.devices.items()
        for name, vendor in self.vendors.items():
            assert vendor.alive == {uuid for uuid, device in devices if device.parent == name}
            assert vendor.pool.free == self.model.free(name)
            assert vendor.pool.holders == {str(uuid): device.class_id for uuid, device in devices if device.parent == name}
        for (bus, name), driver in self.model.drivers.items():
            assert driver.held == {uuid for uuid, device in devices if (device.bus, device.driver) == (bus, name)}

    @invariant()
    def events_tell_the_same(self):
        while self.reader.position < self.registry.events.last:
            event = self.reader.get(0)
            if event.action == "add":
                assert event.subject not in self.told
                self.told[event.subject] = None
            elif event.action == "remove":
                assert self.told.pop(event.subject) is None
            elif event.action == "bind":
                assert self.told[event.subject] is None
                self.told[event.subject] = event.env["DRIVER"]
            elif event.action == "unbind":
                assert self.told[event.subject] == event.env["DRIVER"]
                self.told[event.subject] = None
        assert self.told == {str(uuid): device.driver for uuid, device in self.model.devices.items()}

    def teardown(self):
        self.registry.close()
        for holder in (
            *(vendor.alive for vendor in self.vendors.values()),
            *(driver.held for driver in self.model.drivers.values()),
        ):
            assert not holder
        assert all(vendor.pool.free == 6 for vendor in self.vendors.values())


class LifeCycle(Machine):
    """Parents that come and go, vendors and drivers that fail, power management; one bus, three drivers."""

    def __init__(self):
        super().__init__()
        self.register("one")
        for name, ids in (("alpha", ("c01",)), ("beta", ("c01", "c02")), ("gamma", ())):
            self.add_driver(Moody(name, "left", ids))
        self.spare = list(self.model.drivers.values())

    @rule(
        parent=PARENT,
        class_id=st.sampled_from([1, 2]),
        uuid=ANY_UUID,
        bind=st.booleans(),
        mood=st.sampled_from([0, 0, 0, errno.ENOMEM, LATER]),
    )
    def create(self, parent, class_id, uuid, bind, mood):
        self.vendors[parent].mood = mood
        self.create_expecting(parent, "left", class_id, uuid, bind)

    @rule(name=PARENT)
    def register_parent(self, name):
        self.expect(errno.EEXIST if name in self.model.parents else 0, self.registry.register_parent, self.vendors[name])
        self.model.parents[name] = self.vendors[name]

    @rule(name=PARENT)
    def unregister_parent(self, name):
        self.expect(0 if name in self.model.parents else errno.ENODEV, self.registry.unregister_parent, name)
        self.model.parents.pop(name, None)
        self.model.sleeping_parents.discard(name)
        self.model.devices = {uuid: device for uuid, device in self.model.devices.items() if device.parent != name}

    @rule(number=st.integers(0, 2), mood=MOOD, stubborn=st.booleans())
    def change_mood(self, number, mood, stubborn):
        self.spare[number].mood, self.spare[number].stubborn = MOODS[mood], stubborn

    @rule(number=st.integers(0, 2))
    def unregister_driver(self, number):
        driver = self.spare[number]
        known = self.model.drivers.pop(("left", driver.name), None)
        self.expect(0 if known else errno.ENODEV, self.registry.unregister_driver, "left", driver.name)
        for device in self.model.devices.values():
            if device.driver == driver.name:
                self.model.release(device)

    @rule(number=st.integers(0, 2))
    def register_driver(self, number):
        driver = self.spare[number]
        known = ("left", driver.name) in self.model.drivers
        self.expect(errno.EEXIST if known else 0, self.registry.register_driver, driver)
        self.model.drivers["left", driver.name] = driver

    # -- power ---------------------------------------------------------------------------------------------------------

    @rule(what=st.sampled_from(["everything", "one", "two", *UUIDS]), down=st.booleans())
    def power(self, what, down):
        model = self.model
        parents = set(model.parents) if what == "everything" else {what} & set(model.parents)
        devices = [device for uuid, device in model.devices.items() if uuid == what or device.parent in parents]
        number = 0
        if what != "everything" and not parents and what not in model.devices:
            number = errno.ENODEV
        elif not down and what in model.devices and devices[0].parent in model.sleeping_parents:
            number = errno.EBUSY
        else:
            self.sleep(parents, devices, down, what == "everything")
        call = self.registry.suspend if down else self.registry.resume
        self.expect(number, call, None if what == "everything" else what)

    def sleep(self, parents, devices, down, everything):
        model = self.model
        for device in devices:
            device.asleep = down
        model.sleeping_parents = model.sleeping_parents | parents if down else model.sleeping_parents - parents
        if everything:
            model.asleep = down
        if not down:
            model.wake()

    @invariant()
    def parents_are_as_the_model_says(self):
        assert {parent.name for parent in self.registry.parents} == set(self.model.parents)
        assert {parent.name for parent in self.registry.parents if parent.suspended} == self.model.sleeping_parents


class BindRules(Machine):
    """Two buses, drivers with any id tables that come and go, overrides from the start; parents stay."""

    def __init__(self):
        super().__init__()
        self.register("one")
        self.register("two")

    @rule(
        parent=PARENT,
        bus=BUS,
        class_id=st.sampled_from([1, 2]),
        uuid=ANY_UUID,
        bind=st.booleans(),
        override=st.sampled_from([None, None, "alpha", "beta", "nobody"]),
    )
    def create(self, parent, bus, class_id, uuid, bind, override):
        self.create_expecting(parent, bus, class_id, uuid, bind, override)

    @rule(
        name=DRIVER,
        bus=BUS,
        ids=st.sets(st.sampled_from(["c01", "c02", "c0", "C01", "c01*"]), max_size=3),
        mood=MOOD,
        stubborn=st.booleans(),
    )
    def new_driver(self, name, bus, ids, mood, stubborn):
        driver = Moody(name, bus, tuple(sorted(ids)))
        driver.mood, driver.stubborn = MOODS[mood], stubborn
        known = (bus, name) in self.model.drivers
        self.expect(errno.EEXIST if known else 0, self.registry.register_driver, driver)
        self.model.drivers.setdefault((bus, name), driver)

    @rule(name=DRIVER, bus=BUS)
    def drop_driver(self, name, bus):
        known = self.model.drivers.pop((bus, name), None)
        self.expect(0 if known else errno.ENODEV, self.registry.unregister_driver, bus, name)
        for device in self.model.devices.values():
            if (device.bus, device.driver) == (bus, name):
                self.model.release(device)
        assert not (known and known.held)

    @rule(
        name=DRIVER,
        bus=BUS,
        mood=MOOD,
    )
    def change_mood(self, name, bus, mood):
        if driver := self.model.drivers.get((bus, name)):
            driver.mood = MOODS[mood]


@pytest.mark.parametrize("machine", [LifeCycle, BindRules])
def test_random_lives(machine, caplog):
    caplog.set_level("CRITICAL", "mdevkit")  # drivers that fail are told in the log, which is not what is tested here
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, max_examples=100, stateful_step_count=50, suppress_health_check=checks)
    )
