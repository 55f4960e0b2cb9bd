"""The life-cycle contract: what core and users rely on from every parent, whatever its devices are.

`mdevkit.hookspecs.ParentSpec` states it; each test below checks one sentence of it.
"""

from __future__ import annotations

import errno
import gc
import re
import resource
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from mdevkit import (
    Action,
    Attribute,
    Bool,
    Choice,
    Int,
    Mdev,
    MdevError,
    MdevType,
    Parent,
    Pool,
    Registry,
    State,
    Subscription,
    Text,
)
from mdevkit.parent import UNLIMITED, release, reserve

from mdevkit_testkit.leaks import Snapshot
from mdevkit_testkit.suites.base import Suite, check_error, refused, tolerated

#: Who holds the units of a pool that a test keeps from the devices.
_HOLDER = "the testkit"
#: Threads that create at once.
_CROWD = 8
#: Descriptors a create may need; it is tried with 0, 1, 2 ... of them left.
_DESCRIPTORS = 24


class ParentSuite(Suite):
    """Checks a parent and the life of its devices. Its devices are not bound to a driver unless a test says so."""

    title = "life cycle"

    # -- what a parent states ------------------------------------------------------------------------------------------

    def test_parent_and_type_are_stated(self, mdev_type: MdevType) -> None:
        """Checks that the parent has a name that fits a file name, and that the type tells people and tools what it is."""
        name = mdev_type.parent.name
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", name), f"parent name {name!r} is not a file name"
        assert mdev_type.device_api, f"{mdev_type} has no device_api; a tool cannot tell what its devices are"
        assert mdev_type.name.isprintable(), f"the name of {mdev_type} has control characters: {mdev_type.name!r}"
        for line in mdev_type.description.splitlines():
            assert line.isprintable(), f"the description of {mdev_type} has control characters: {line!r}"

    def test_bus_of_every_type_is_there(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that the class bus of the type is installed: the distribution has to depend on the package that brings it."""
        assert registry.bus(mdev_type.bus, mdev_type).name == mdev_type.bus

    def test_fresh_parent_has_room(self, mdev_type: MdevType) -> None:
        """Checks that at least one device of the type can be created, and that it takes whole units from its pools."""
        for pool, units in mdev_type.costs.items():
            assert units >= 1, f"{mdev_type} takes {units} {pool.name}"
        assert mdev_type.available_instances >= 1, f"a fresh parent has no room for a device of {mdev_type}"

    def test_factory_makes_parents_that_share_nothing(self, mdev_type: MdevType) -> None:
        """Checks that a second parent made by the factory has types and pools of its own."""
        before = mdev_type.available_instances
        with self.make_registry() as other:
            twin = other.type(mdev_type.id)
            assert twin is not mdev_type, f"{mdev_type} is one object in two parents: make types in __init__"
            self.create(twin, other)
            assert mdev_type.available_instances == before, f"a device of another registry took an instance of {mdev_type}"

    # -- attributes ----------------------------------------------------------------------------------------------------

    def test_attributes_can_be_read(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that every attribute that can be read shows a value of its kind."""
        mdev = self.create(mdev_type, registry)
        for owner, attribute in _attributes(mdev):
            if attribute.show is not None:
                value = _read(owner, attribute)
                text = attribute.kind.format(value)
                assert attribute.kind.check(text) == value, f"attribute {attribute.name} of {owner} shows {text!r}, not of its kind"

    def test_attribute_can_be_set_to_what_it_shows(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that an attribute that can be read and set takes its own value, or refuses it, and shows the same after."""
        mdev = self.create(mdev_type, registry)
        for owner, attribute in _attributes(mdev):
            if attribute.show is not None and attribute.store is not None:
                before = _read(owner, attribute)
                with tolerated(f"setting {attribute.name} of {owner} to its own value {before!r}"):
                    _table(owner).write(attribute.name, before, owner)
                after = _read(owner, attribute)
                assert after == before, f"attribute {attribute.name} of {owner} shows {after!r} after it was set to {before!r}"

    def test_bad_attribute_values_are_refused(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a value an attribute does not take is refused with EINVAL and changes nothing."""
        mdev = self.create(mdev_type, registry)
        for owner, attribute in _attributes(mdev):
            known, bad = _bad_values(attribute)
            for text in bad:
                doing = f"the value {text[:40]!r} for attribute {attribute.name} of {owner}"
                with refused(doing, errno.EINVAL) if known else tolerated(doing):
                    attribute.parse(text, owner)
            if known and bad and attribute.store is not None:
                _check_store_refuses(owner, attribute, bad[0])

    def test_default_parameters_are_acceptable(self, mdev_type: MdevType) -> None:
        """Checks that the default of every create parameter is a value the parameter takes."""
        for attribute in mdev_type.device_table.values():
            if attribute.create and attribute.default is not None:
                attribute.parse(attribute.default, mdev_type)

    def test_create_with_a_bad_parameter_consumes_nothing(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a create with a bad or unknown parameter is refused and leaves everything as it was."""
        bad = {"no-such-attribute": "1"}
        for attribute in mdev_type.device_table.values():
            known, values = _bad_values(attribute)
            if attribute.create and known and values:
                bad[attribute.name] = values[0]
        with _nothing_changes(registry, mdev_type):
            for name, value in bad.items():
                with refused(f"a create with {name}={value[:40]!r}", errno.EINVAL, errno.ENOENT):
                    self.create(mdev_type, registry, params={**self.params, name: value})

    # -- create and remove ---------------------------------------------------------------------------------------------

    def test_device_lives_and_goes(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a create sets class and ops, that the device can be found, and that a remove takes it away."""
        mdev = self.create(mdev_type, registry)
        assert mdev.class_id, f"{mdev} has no class id"
        assert registry.get(mdev.uuid) is mdev
        registry.remove(mdev.uuid)
        assert mdev.state is State.GONE
        with refused(f"looking for the removed {mdev}", errno.ENODEV):
            registry.get(mdev.uuid)

    def test_create_and_remove_many_times_leaves_nothing(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that ten rounds of create and remove leave no descriptor, mapping, thread or child process behind."""
        self._round(mdev_type, registry)
        before = Snapshot.take()
        for _ in range(10):
            self._round(mdev_type, registry)
        left = before.leaks()
        assert not left, f"left behind by 10 devices: {', '.join(left)}"

    def test_removed_device_is_forgotten(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that the vendor keeps no reference to a removed device, which would hold its memory for ever."""
        mdev = self.create(mdev_type, registry)
        uuid, reference = mdev.uuid, weakref.ref(mdev)
        del mdev
        registry.remove(uuid)
        gc.collect()
        assert reference() is None, f"the parent still refers to its removed device: {_holders(reference())}"

    def test_instances_are_counted_exactly(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that as many devices as available_instances says can be created, twice over, and that each one counts."""
        first = mdev_type.available_instances
        for _ in range(2):
            mdevs = []
            for number in range(min(first, self.most)):
                left, expected = mdev_type.available_instances, first if first == UNLIMITED else first - number
                assert left == expected, f"{left} instances of {mdev_type} are left after {number} of {first} were used"
                mdevs.append(self._create_promised(mdev_type, registry))
            for mdev in mdevs:
                registry.remove(mdev.uuid)
            assert mdev_type.available_instances == first, "instances are lost after every device was removed"

    def test_create_without_room_fails_cleanly(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a create beyond the last instance gets ENOSPC with who holds them, changes nothing, and works later."""
        if not mdev_type.costs:  # then there is no last instance
            self.create(mdev_type, registry)
            assert mdev_type.available_instances == UNLIMITED, f"{mdev_type} takes from no pool, and yet its instances run out"
            return
        with _room_for(mdev_type, 1):
            mdev = self.create(mdev_type, registry)
            with _nothing_changes(registry, mdev_type):
                with pytest.raises(MdevError) as caught:
                    self.create(mdev_type, registry)
                assert caught.value.errno == errno.ENOSPC, f"without room the create failed with {caught.value.name}, not ENOSPC"
                holder = caught.value
                assert mdev.name in str(holder) or _HOLDER in str(holder), f"the error does not say who holds the pool: {holder}"
                del caught, holder
            registry.remove(mdev.uuid)
            self._create_promised(mdev_type, registry)

    def test_create_is_undone_when_no_driver_takes_the_device(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a create which fails after the vendor's part has succeeded leaves nothing behind."""
        self._round(mdev_type, registry)
        with _nothing_changes(registry, mdev_type):
            with refused("a create for a driver that does not exist", errno.ENODEV):
                self.create(mdev_type, registry, bind=True, driver_override="no-such-driver")

    def test_create_is_atomic_when_descriptors_run_out(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a create which fails half way, for want of a descriptor, raises an OSError and leaves nothing behind."""
        self._round(mdev_type, registry)
        for left in range(_DESCRIPTORS):
            doing, mdev = f"a create with {left} descriptors left", None
            with _nothing_changes(registry, mdev_type, f"after {doing}: "):
                with tolerated(doing), _descriptors_left(left):
                    mdev = self.create(mdev_type, registry)
                if mdev is not None:
                    registry.remove(mdev.uuid)
                    return

    def test_second_remove_is_refused(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a device can be removed once."""
        mdev = self.create(mdev_type, registry)
        registry.remove(mdev.uuid)
        with refused("removing a removed device", errno.ENODEV):
            registry.remove(mdev.uuid)

    def test_remove_takes_a_bound_device_from_its_driver(
        self, registry: Registry, mdev_type: MdevType, runtime_folder: Path
    ) -> None:
        """Checks that a device in the hands of a driver can be removed, and that nothing of its endpoint is left."""
        mdev = self.create_bound(mdev_type, registry)
        with _events(registry) as events:
            registry.remove(mdev.uuid)
        # The driver's own devices below this one have theirs too.
        assert [event.action for event in events if event.subject == mdev.name] == [Action.UNBIND, Action.REMOVE]
        left = [path.name for path in runtime_folder.rglob("*") if not path.is_dir()]
        assert not left, f"files of the endpoint are left: {', '.join(left)}"

    def test_many_create_and_remove_at_once(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that creates and removes from many threads at once give each instance to one device, and take it back."""
        room = min(_CROWD - 3, mdev_type.available_instances)
        with _room_for(mdev_type, room), ThreadPoolExecutor(_CROWD) as crowd:
            outcomes = _together(crowd, [partial(self.create, mdev_type, registry)] * _CROWD)
            mdevs = [outcome for outcome in outcomes if isinstance(outcome, Mdev)]
            expected = room if mdev_type.costs else _CROWD
            assert len(mdevs) == expected, f"{len(mdevs)} of {_CROWD} creates at once succeeded, not {expected}: {outcomes}"
            assert len({id(mdev._ops) for mdev in mdevs}) == len(mdevs), "two devices were given the same ops object"
            removes = _together(crowd, [partial(registry.remove, mdev.uuid) for mdev in mdevs * 2])
            assert removes.count(None) == len(mdevs), f"removing {len(mdevs)} devices twice at once: {removes}"
        assert mdev_type.available_instances == self._fresh_instances(mdev_type)

    def test_leaving_parent_removes_its_devices(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that an unregistered parent takes its devices along, and that the factory's next one can take its place."""
        parent = mdev_type.parent
        before = Snapshot.take()
        mdevs = [self.create(mdev_type, registry) for _ in range(min(2, mdev_type.available_instances))]
        registry.unregister_parent(parent.name)
        assert [mdev.state for mdev in mdevs] == [State.GONE] * len(mdevs)
        left = before.leaks()
        assert not left, f"left behind by a parent that was unregistered: {', '.join(left)}"
        again = next(ops for ops in self.parents() if ops.name == parent.name)
        self.create(registry.register_parent(again).types[mdev_type.id], registry)

    # -- power ---------------------------------------------------------------------------------------------------------

    def test_suspend_and_resume(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that device, parent and whole registry can be suspended and resumed, and the device removed after it."""
        mdev = self.create(mdev_type, registry)
        for target in (mdev.uuid, mdev_type.parent.name, None):
            registry.suspend(target)
            assert mdev.suspended, f"{mdev} is not suspended after suspending {target or 'everything'}"
            registry.resume(target)
            assert not mdev.suspended, f"{mdev} is still suspended after resuming {target or 'everything'}"
        registry.remove(mdev.uuid)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _round(self, type_: MdevType, registry: Registry) -> None:
        registry.remove(self.create(type_, registry).uuid)

    def _create_promised(self, type_: MdevType, registry: Registry) -> Mdev:
        promised = type_.available_instances
        try:
            return self.create(type_, registry)
        except MdevError as error:
            raise AssertionError(f"available_instances of {type_} says {promised}, but create failed: {error}") from error

    def _fresh_instances(self, type_: MdevType) -> int:
        with self.make_registry() as registry:
            return registry.type(type_.id).available_instances


# -- attributes ------------------------------------------------------------------------------------------------------------

_Owner = Parent | MdevType | Mdev


def _table(owner: _Owner) -> Any:
    return owner.type.device_table if isinstance(owner, Mdev) else owner.table


def _attributes(mdev: Mdev) -> Iterator[tuple[_Owner, Attribute[Any]]]:
    for owner in (mdev.parent, mdev.type, mdev):
        for attribute in _table(owner).values():
            yield owner, attribute


def _read(owner: _Owner, attribute: Attribute[Any]) -> Any:
    try:
        return _table(owner).read(attribute.name, owner)
    except MdevError as error:
        raise AssertionError(f"attribute {attribute.name} of {owner} cannot be shown: {error}") from error


def _bad_values(attribute: Attribute[Any]) -> tuple[bool, list[str]]:
    """Return texts to refuse, and whether they must be refused: of a vendor's own kind nothing is known."""
    kind = attribute.kind
    match kind:
        case Int():
            return True, [str(kind.low - 1), str(kind.high + 1), "", "x", "1.5"]
        case Bool():
            return True, ["maybe", "", "2"]
        case Choice():
            return True, [text for text in ("no such word", "", "\0") if text not in kind.words]
        case Text():
            return True, ["x" * (kind.longest + 1)] + [text for text in ("\0", "") if not re.fullmatch(kind.pattern, text)]
    return False, ["", "\0", "no such value", "-1", "x" * 5000]


def _check_store_refuses(owner: _Owner, attribute: Attribute[Any], bad: str) -> None:
    before = _read(owner, attribute) if attribute.show else None
    with refused(f"setting {attribute.name} of {owner} to {bad[:40]!r}", errno.EINVAL):
        _table(owner).write(attribute.name, bad, owner)
    after = _read(owner, attribute) if attribute.show else None
    assert after == before, f"attribute {attribute.name} of {owner} went from {before!r} to {after!r} by a value that was refused"


# -- pools and leaks -------------------------------------------------------------------------------------------------------


@contextmanager
def _room_for(type_: MdevType, instances: int) -> Iterator[None]:
    """Keep all units from the devices but those for `instances` more of the type."""
    kept = {pool: pool.free - units * instances for pool, units in type_.costs.items()}
    kept = {pool: units for pool, units in kept.items() if units > 0}
    reserve(kept, _HOLDER, type_)
    try:
        yield
    finally:
        release(kept, _HOLDER)


def _pools(type_: MdevType) -> set[Pool]:
    return {pool for sibling in type_.parent.types.values() for pool in sibling.costs}


@contextmanager
def _nothing_changes(registry: Registry, type_: MdevType, when: str = "") -> Iterator[None]:
    """Check that the block leaves pools, devices and the process's resources as they are."""
    before, mdevs, snapshot = {pool: pool.holders for pool in _pools(type_)}, registry.mdevs, Snapshot.take()
    yield
    for pool, holders in before.items():
        assert pool.holders == holders, f"{when}units of {pool.name} are held by {pool.holders}, before by {holders}"
    assert registry.mdevs == mdevs, f"{when}the devices are {registry.mdevs}, before {mdevs}"
    left = snapshot.leaks()
    assert not left, f"{when}left behind: {', '.join(left)}"


@contextmanager
def _descriptors_left(number: int) -> Iterator[None]:
    """Let the process open `number` more descriptors and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken, limit = set(Snapshot.take().descriptors), 0
    while limit in taken or number > 0:
        number -= limit not in taken
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _holders(removed: object) -> str:
    """Describe who refers to an object, for a message."""
    kinds = {type(holder).__qualname__ for holder in gc.get_referrers(removed) if type(holder).__name__ != "frame"}
    return ", ".join(sorted(kinds)) or "unknown"


# -- events and threads ----------------------------------------------------------------------------------------------------


@contextmanager
def _events(registry: Registry) -> Iterator[list[Any]]:
    """Collect the events of the block."""
    subscription, found = registry.events.subscribe(), list[Any]()
    yield found
    while (event := _next(subscription)) is not None:
        found.append(event)


def _next(subscription: Subscription) -> Any:
    try:
        return subscription.get(0)
    except TimeoutError:
        return None


def _together(crowd: ThreadPoolExecutor, calls: list[Callable[[], Any]]) -> list[Any]:
    """Make all calls at once, a thread each; return what each gave, errors included."""
    barrier = Barrier(len(calls)) if len(calls) <= _CROWD else None

    def call(wanted: Callable[[], Any]) -> Any:
        if barrier is not None:
            barrier.wait()
        try:
            return wanted()
        except OSError as error:
            check_error(error, "a create or remove among many")
            return error

    return list(crowd.map(call, calls))
