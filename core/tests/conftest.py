"""What the tests of core share: a card, a bus and drivers whose every hook can be made to wait, to fail or to call back."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from mdevkit import Attribute, Bus, Choice, Driver, Int, MdevError, MdevType, ParentOps, Pool, Registry, State, hookimpl

#: Seconds after which a thread that should have come back hangs. Only reached by a test that fails.
PATIENCE = 20.0


def nothing(*arguments):
    """What a hook does unless a test has it do something."""


class Bench(Bus):
    """A class bus without opinions."""

    name = "bench"


class Card(ParentOps):
    """A parent with `capacity` ports and two types: card-1 takes one port, card-2 takes two. Set `on_...` to join in."""

    def __init__(self, name="card", capacity=8, *, bus="bench", class_id=1, driver_name="", pool=None, attributes=()):
        self.name, self.driver_name, self.class_id = name, driver_name, class_id
        self.pool = pool or Pool("ports", capacity)
        speed = Attribute("speed", Int(0, 9), "Speed.", lambda mdev: mdev.drvdata, self._set_speed, create=True, default=3)
        mode = Attribute("mode", Choice(("fast", "slow")), "Mode.", create=True, default="fast")
        own = (speed, mode, *attributes)
        self.types = [
            MdevType("1", bus, "vfio-pci", costs={self.pool: 1}, device_attributes=own),
            MdevType("2", bus, "vfio-pci", costs={self.pool: 2}, device_attributes=own),
        ]
        #: What the vendor has in hand, by UUID: it must be empty when all devices are gone.
        self.alive = {}
        self.calls = []
        self.on_create = self.on_remove = self.on_unregister = self.on_suspend = self.on_resume = nothing

    @staticmethod
    def _set_speed(mdev, value):
        mdev.drvdata = value

    @hookimpl
    def parent_create(self, mdev, params):
        self.calls.append(("create", mdev.name))
        self.on_create(mdev, params)
        mdev.drvdata = params["speed"]
        if self.class_id:
            mdev._set_class(self.class_id, self)
        self.alive[mdev.uuid] = mdev.name

    @hookimpl
    def parent_remove(self, mdev):
        self.calls.append(("remove", mdev.name))
        del self.alive[mdev.uuid]
        self.on_remove(mdev)

    @hookimpl
    def parent_unregister(self, parent):
        self.calls.append(("unregister", parent.name))
        self.on_unregister(parent)

    @hookimpl
    def parent_suspend(self, parent):
        self.calls.append(("suspend", parent.name))
        self.on_suspend(parent)

    @hookimpl
    def parent_resume(self, parent):
        self.calls.append(("resume", parent.name))
        self.on_resume(parent)


class Endpoint:
    """What a test driver offers."""

    def __init__(self, device):
        self.device_name = device.name

    def describe(self):
        return {"kind": "test", "client": ""}

    def attach(self, client):
        return [client]


class Taker(Driver):
    """A driver that keeps account of what it holds."""

    def __init__(self, name="taker", id_table=("c01",), bus="bench"):
        self.name, self.id_table, self.bus = name, id_table, bus
        #: Devices in hand, by name.
        self.held = {}
        self.calls = []
        self.on_probe = self.on_remove = self.on_let_go = self.on_suspend = self.on_resume = nothing

    @hookimpl
    def driver_probe(self, device):
        self.calls.append(("probe", device.name))
        self.on_probe(device)
        self.held[device.name] = endpoint = Endpoint(device)
        return endpoint

    @hookimpl
    def driver_remove(self, device):
        self.calls.append(("remove", device.name))
        assert device.endpoint is not None, "the driver finds its endpoint"
        del self.held[device.name]
        self.on_remove(device)

    @hookimpl
    def driver_let_go(self, device, timeout, force):
        self.calls.append(("let_go", device.name))
        self.on_let_go(device, timeout, force)

    @hookimpl
    def driver_suspend(self, device):
        self.calls.append(("suspend", device.name))
        self.on_suspend(device)

    @hookimpl
    def driver_resume(self, device):
        self.calls.append(("resume", device.name))
        self.on_resume(device)


class Gate:
    """Holds a thread inside a hook: the hook calls the gate, the test waits for `entered` and calls `open`."""

    def __init__(self):
        self.entered = threading.Event()
        self._opened = threading.Event()

    def __call__(self, *arguments):
        self.entered.set()
        assert self._opened.wait(PATIENCE), "nobody opened the gate"

    def wait(self):
        assert self.entered.wait(PATIENCE), "nobody came to the gate"
        return self

    def open(self):
        self._opened.set()


class Threads:
    """Starts functions in threads of their own; at the end of the test all of them must have come back."""

    def __init__(self):
        self._threads = []

    def __call__(self, function, *arguments, **keywords):
        future = Future()

        def run():
            try:
                future.set_result(function(*arguments, **keywords))
            except BaseException as error:  # noqa: BLE001  (handed on to whoever asks the future)
                future.set_exception(error)

        # A daemon, so that a deadlock fails its test and lets the others run.
        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def join(self):
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread.name} hangs"


def until(condition):
    """Wait until a condition holds that another thread brings about without telling anybody."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)  # polling: what is waited for (a thread that blocks on a lock) has no event of its own


def check_consistent(registry, *cards, drivers=()):
    """Check that registry, vendors and drivers agree about what there is."""
    there = {mdev.uuid for mdev in registry.mdevs}
    assert set(registry._uuids) == there
    assert set().union(*(card.alive for card in cards)) == there
    for card in cards:
        mine = [mdev for mdev in registry.mdevs if mdev.parent.ops is card]
        assert card.pool.holders == {mdev.name: mdev.type.costs[card.pool] for mdev in mine}
        assert card.pool.free == card.pool.capacity - sum(card.pool.holders.values())
    for driver in drivers:
        bound = {mdev.name for mdev in registry.mdevs if mdev.driver == driver.name}
        assert set(driver.held) == bound
    for mdev in registry.mdevs:
        assert (mdev.driver is not None) == (mdev.state is State.BOUND) == (mdev.endpoint is not None)


@pytest.fixture
def kit():
    """The classes and helpers above."""
    return SimpleNamespace(
        Bus=Bench, Card=Card, Taker=Taker, Endpoint=Endpoint, Gate=Gate, until=until, consistent=check_consistent, PATIENCE=PATIENCE
    )


@pytest.fixture
def card():
    return Card()


@pytest.fixture
def taker():
    return Taker()


@pytest.fixture
def registry(card, taker):
    """A bus, a driver and a card; everybody must agree at the end, and nothing may be left after closing."""
    with Registry([Bench(), taker, card], remove_timeout=0.05) as made:
        yield made
        check_consistent(made, card, drivers=[taker])
    assert not card.alive
    assert not taker.held
    assert card.pool.free == card.pool.capacity


@pytest.fixture
def thread():
    """Runs a function in a thread and returns a Future."""
    threads = Threads()
    yield threads
    threads.join()


@pytest.fixture
def fails():
    """Checks that a call fails with an MdevError of an errno, and returns its sentence."""

    def check(number, call, *arguments, **keywords):
        with pytest.raises(MdevError) as caught:
            call(*arguments, **keywords)
        assert caught.value.errno == number, caught.value
        assert "\n" not in str(caught.value), "a sentence is one line"
        return str(caught.value)

    return check


@pytest.fixture
def events():
    """Returns what a registry told so far, as (action, subject) or with the value of a variable."""

    def told(registry, subject=None, *variables):
        log = registry.events.subscribe(0)
        found = [log.get(0) for _ in range(registry.events.last)]
        return [
            (str(event.action), event.subject, *(event.env.get(name) for name in variables))
            for event in found
            if subject in {None, event.subject}
        ]

    return told
