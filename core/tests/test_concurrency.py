"""Many threads at once. What must hold under any interleaving is forced in test_lifecycle.py; here it is under load."""

from __future__ import annotations

import errno
import random
import sys
import threading
from collections import Counter
from uuid import uuid4

import pytest
from mdevkit import Device, LaggedError, MdevError, Registry


@pytest.fixture(autouse=True)
def eager():
    """Switch threads a hundred times as often as usual, so that short races have a chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def outcome(call, *arguments, **keywords):
    try:
        return call(*arguments, **keywords)
    except MdevError as error:
        return error


def at_once(thread, patience, calls):
    """Make all the calls at the same moment, each in a thread, and return their outcomes."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait(patience)
        return outcome(call)

    return [future.result(patience) for future in [thread(run, call) for call in calls]]


@pytest.mark.parametrize("parents", [1, 3])
def test_two_hundred_creates_for_twenty_four_ports(kit, thread, parents):
    cards = [kit.Card(f"card{number}", 24 // parents, driver_name="card") for number in range(parents)]
    with Registry([kit.Bus(), kit.Taker(), *cards]) as registry:
        results = at_once(thread, kit.PATIENCE, [lambda: registry.create("card-1")] * 200)
        made = {result.name for result in results if not isinstance(result, MdevError)}
        refused = [result for result in results if isinstance(result, MdevError)]
        assert (len(made), len(refused)) == (24, 176)
        for error in refused:
            assert error.errno == errno.ENOSPC
            assert str(error).startswith(f"type card-1: no instance available: 1 of {24 // parents} ports wanted, 0 free (")
            named = str(error).split("(")[1].split(", ")[0].split(" ")[0]
            assert named in made or named not in registry._uuids
        assert [card.pool.free for card in cards] == [0] * parents
        kit.consistent(registry, *cards)


def test_the_same_uuid_on_two_parents_fifty_times(kit, thread):
    cards = [kit.Card("left", 99), kit.Card("right", 99)]
    with Registry([kit.Bus(), kit.Taker(), *cards]) as registry:
        for _ in range(50):
            uuid = uuid4()
            calls = [lambda side=side, uuid=uuid: registry.create(f"{side}-1", uuid=uuid) for side in ("left", "right")]
            results = at_once(thread, kit.PATIENCE, calls)
            (winner,) = [result for result in results if not isinstance(result, MdevError)]
            (loser,) = [result for result in results if isinstance(result, MdevError)]
            assert loser.errno == errno.EEXIST
            assert str(loser) == f"UUID {uuid} is in use by a device of {winner.type} on {winner.parent}"
            assert registry.get(uuid) is winner
        assert len(registry.mdevs) == 50
        kit.consistent(registry, *cards)


def test_one_of_many_removes_removes(registry, thread, kit, card):
    for _ in range(20):
        mdev = registry.create("card-1")
        results = at_once(thread, kit.PATIENCE, [lambda mdev=mdev: registry.remove(mdev.uuid)] * 8)
        assert results.count(None) == 1
        assert {error.errno for error in results if error} <= {errno.EAGAIN, errno.ENODEV}
        assert card.calls.count(("remove", mdev.name)) == 1


def test_one_of_many_binds_binds(registry, thread, kit, taker):
    mdev = registry.create("card-1", bind=False)
    for _ in range(20):
        results = at_once(thread, kit.PATIENCE, [lambda: registry.attach(mdev.uuid)] * 8)
        assert results.count(None) == 1
        assert {error.errno for error in results if error} == {errno.EBUSY}
        results = at_once(thread, kit.PATIENCE, [lambda: registry.unbind(mdev.uuid)] * 8)
        assert results.count(None) == 1
        assert {error.errno for error in results if error} == {errno.ENODEV}


def test_creating_while_the_parent_comes_and_goes(kit, thread, taker):
    """A create succeeds and its device is removed with the parent, or it is refused; nothing in between."""
    card = kit.Card("card", 64)
    with Registry([kit.Bus(), taker, card]) as registry:
        stop = threading.Event()
        made, refused = [], []

        def create():
            while not stop.is_set():
                result = outcome(registry.create, "card-1")
                (refused if isinstance(result, MdevError) else made).append(result)

        workers = [thread(create) for _ in range(4)]
        for _ in range(40):
            registry.unregister_parent("card")
            assert (card.alive, taker.held, card.pool.free) == ({}, {}, 64)
            registry.register_parent(card)
        stop.set()
        for worker in workers:
            worker.result(kit.PATIENCE)
        assert made
        assert {error.errno for error in refused} <= {errno.ENODEV, errno.ENOSPC}
        kit.consistent(registry, card, drivers=[taker])
    assert (card.alive, taker.held) == ({}, {})
    assert {mdev.state for mdev in made} == {"gone"}


#: Which events may follow which, for one device.
AFTER = {
    None: {"add"},
    "add": {"bind", "unbind", "remove", "change"},
    "bind": {"unbind"},
    "unbind": {"bind", "remove", "change"},
    "change": {"bind", "remove", "change"},
    "remove": {None},
}


def test_everything_at_once(kit, thread):
    """Creates, removes, binds, overrides, driver and parent changes, power and plain devices, failing now and then."""
    card, side = kit.Card("card", 30), kit.Card("side", 30, driver_name="card")
    taker, other = kit.Taker(), kit.Taker("other", ("c01", "child"))
    dice = random.Random(4)

    def sometimes(*_):
        roll = dice.random()
        if roll < 0.15:
            raise OSError(517, "later")
        if roll < 0.3:
            raise OSError(errno.EIO, "bad luck")

    taker.on_probe = other.on_probe = card.on_create = sometimes
    unexpected = []
    with Registry([kit.Bus(), taker, other, card, side], remove_timeout=0) as registry:
        follow = thread(check_events, registry.events.subscribe(0))

        def work(seed):
            mine = random.Random(seed)
            for _ in range(1000):
                try:
                    step(registry, mine)
                except MdevError:
                    pass
                except Exception as error:
                    unexpected.append(error)
                    raise

        for worker in [thread(work, seed) for seed in range(6)]:
            worker.result(2 * kit.PATIENCE)
        registry.resume()
        taker.on_probe = other.on_probe = card.on_create = lambda *_: None
        for mdev in registry.mdevs:
            outcome(registry.attach, mdev.uuid)
        kit.consistent(registry, card, side)
        assert {mdev.state for mdev in registry.mdevs} <= {"bound"}
    assert (card.alive, side.alive, taker.held, other.held) == ({}, {}, {}, {})
    assert (card.pool.free, side.pool.free) == (30, 30)
    assert not unexpected
    seen, missed = follow.result(kit.PATIENCE)
    assert seen + missed == registry.events.last
    assert missed == 0, "the reader does nothing but read"


def step(registry, dice):
    """Do one thing, to a device that may be in anybody's hands."""
    mdevs = registry.mdevs
    uuid = dice.choice(mdevs).uuid if mdevs else uuid4()
    what = dice.randrange(12)
    if what < 3:
        registry.create(dice.choice(("card-1", "card-2")), bind=dice.random() < 0.5)
    elif what < 5:
        registry.remove(uuid, force=dice.random() < 0.5)
    elif what == 5:
        registry.attach(uuid)
    elif what == 6:
        registry.unbind(uuid)
    elif what == 7:
        registry.bind(uuid, dice.choice(("taker", "other", "nobody")), override=dice.random() < 0.5)
    elif what == 8:
        registry.set_driver_override(uuid, dice.choice((None, "taker", "other")))
    elif what == 9:
        getattr(registry, dice.choice(("suspend", "resume")))(dice.choice((None, "card", uuid)))
        registry.resume()
    elif what == 10:
        driver = next((driver for driver in registry.drivers if driver.name == "other"), None)
        if driver is not None and dice.random() < 0.3:
            try:
                registry.unregister_driver("bench", "other")
            finally:
                if driver not in registry.drivers:
                    registry.register_driver(driver)
    else:
        child = Device("child", "bench", registry.get(uuid))
        registry.add_device(child)
        registry.del_device(child)


def check_events(subscription):
    """Read to the end: numbers without gaps, and for each device an order that makes sense."""
    seen = missed = 0
    last = {}
    while True:
        try:
            event = subscription.get()
        except LaggedError as error:
            missed += error.missed
            last.clear()
            continue
        if event is None:
            return seen, missed
        seen += 1
        if "-" in event.subject and not missed:
            before = last.pop(event.subject, None)
            assert event.action in AFTER[before] or (before == "remove" and event.action == "add"), (event, before)
            last[event.subject] = str(event.action)


def test_events_of_each_device_in_order_exactly_once(registry, thread, kit):
    """Several readers, some of which start late; each sees the same."""
    early = [registry.events.subscribe(0) for _ in range(3)]

    def churn():
        for _ in range(60):
            mdev = outcome(registry.create, "card-1")
            if not isinstance(mdev, MdevError):
                registry.unbind(mdev.uuid)
                registry.attach(mdev.uuid)
                registry.remove(mdev.uuid)

    readers = [thread(list, subscription) for subscription in early]
    for worker in [thread(churn) for _ in range(6)]:
        worker.result(kit.PATIENCE)
    registry.close()
    told = [future.result(kit.PATIENCE) for future in readers]
    assert told[0] == told[1] == told[2]
    assert [event.seq for event in told[0]] == list(range(1, registry.events.last + 1))
    of = {}
    for event in told[0]:
        of.setdefault(event.subject, []).append(str(event.action))
    of.pop("card")
    assert Counter(map(tuple, of.values())) == {("add", "bind", "unbind", "bind", "unbind", "remove"): len(of)}
