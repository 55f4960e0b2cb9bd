"""Parents and what they state: types, and the pools instances are taken from.

A vendor subclasses `ParentOps`; core makes a `Parent` of it when it is registered.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from mdevkit.attributes import Attribute, AttributeTable
from mdevkit.errors import MdevError, shown

if TYPE_CHECKING:
    from uuid import UUID

    from mdevkit.device import Device, Mdev
    from mdevkit.dispatch import ParentHooks

#: available_instances of a type that takes from no pool (INT_MAX, as mvnet_loopback reports).
UNLIMITED = 2**31 - 1

_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
#: A file name that needs no quoting: 0000:06:00.0, mtty, card@2.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+-]*")


class Pool:
    """A number of units that devices are made of: ports, megabytes, slots. Types may share one; any thread may ask.

    `name` says what a unit is, in the plural ("ports"); `capacity` is how many there are.
    """

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 0:
            raise MdevError(errno.EINVAL, f"a pool of {capacity} {name} cannot be", self)
        self.name = name
        self.capacity = capacity
        self._used = 0
        self._holders: dict[Hashable, int] = {}
        #: Who has units set aside, whether or not its device exists.
        self._ahead: set[Hashable] = set()
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Units nobody holds."""
        return self.capacity - self._used

    @property
    def holders(self) -> dict[Hashable, int]:
        """Who holds how many units."""
        with self._lock:
            return dict(self._holders)

    def set_aside(self, units: int, holder: str, subject: Any = None) -> None:
        """Take units ahead for the device with UUID `holder`, whose creation then takes no more (devlink's port add).

        ENOSPC as for a create; EEXIST if `holder` has units already; EINVAL for less than one. A creation that would need more
        units than these is EINVAL too.
        """
        if units < 1:
            raise MdevError(errno.EINVAL, f"{units} {self.name} cannot be set aside: 1 is the least", self)
        with self._lock:
            if holder in self._holders:
                raise MdevError(errno.EEXIST, f"{holder} already holds {self._holders[holder]} {self.name}", subject)
            self._check(units, subject or self)
            self._hold(units, holder)
            self._ahead.add(holder)

    def give_back(self, holder: str) -> None:
        """Undo `set_aside`; the caller sees to it that the device does not exist. ENOENT if nothing is set aside."""
        with self._lock:
            if holder not in self._ahead:
                raise MdevError(errno.ENOENT, f"{holder} has no {self.name} set aside", self)
            self._ahead.discard(holder)
            self._used -= self._holders.pop(holder)

    def _check(self, units: int, subject: Any) -> None:
        if units > self.free:
            raise MdevError(errno.ENOSPC, f"{subject}: no instance available: {self._shortage(units)}", subject)

    def _check_ahead(self, units: int, holder: Hashable, subject: Any) -> None:
        if units > self._holders[holder]:
            held = f"{self._holders[holder]} {self.name} are set aside for {holder}"
            raise MdevError(errno.EINVAL, f"{subject}: {held}, {units} are wanted", subject)

    def _hold(self, units: int, holder: Hashable) -> None:
        self._used += units
        self._holders[holder] = units

    def _shortage(self, units: int) -> str:
        named = [f"{holder} holds {held}" for holder, held in islice(self._holders.items(), 4)]
        if len(self._holders) > len(named):
            named.append(f"and {len(self._holders) - len(named)} more devices hold the rest")
        held = f" ({', '.join(named)})" if named else ""
        return f"{units} of {self.capacity} {self.name} wanted, {self.free} free{held}"


def check_room(costs: Mapping[Pool, int], subject: Any) -> None:
    """Raise ENOSPC, as `reserve` would now, and take nothing."""
    for pool, units in costs.items():
        with pool._lock:
            pool._check(units, subject)


def reserve(costs: Mapping[Pool, int], holder: Hashable, subject: Any) -> None:
    """Take units from every pool, or from none: ENOSPC says what is short and who holds it.

    Pools in which `holder` has units set aside have given them already: EINVAL if those are too few.
    """
    with ExitStack() as stack:
        for pool in sorted(costs, key=id):
            stack.enter_context(pool._lock)
        wanted = {pool: units for pool, units in costs.items() if holder not in pool._ahead}
        for pool, units in costs.items():
            if pool in wanted:
                pool._check(units, subject)
            else:
                pool._check_ahead(units, holder, subject)
        for pool, units in wanted.items():
            pool._hold(units, holder)


def release(costs: Mapping[Pool, int], holder: Hashable) -> None:
    """Give back what `reserve` took."""
    for pool in costs:
        with pool._lock:
            if holder not in pool._ahead:
                # What was set aside may have been given back while the device went.
                pool._used -= pool._holders.pop(holder, 0)


class DeviceTable(AttributeTable):
    """The attributes of devices: their removal waits for the calls that are running, and refuses others (ENODEV)."""

    def read(self, name: str, subject: Mdev) -> Any:
        """See `AttributeTable.read`."""
        subject.enter_attribute()
        try:
            return super().read(name, subject)
        finally:
            subject.leave_attribute()

    def write(self, name: str, value: Any, subject: Mdev) -> None:
        """See `AttributeTable.write`."""
        subject.enter_attribute()
        try:
            super().write(name, value, subject)
        finally:
            subject.leave_attribute()


@dataclass(eq=False)
class MdevType:
    """A kind of device a parent can create.

    `group` is the vendor's short name; the type's `id`, its name in sysfs, is ``<parent driver>-<group>``. `name` and `description`
    are for people. `bus` is the class bus its devices land on. Each instance takes `costs` units from the pools; without a pool
    there is no limit. `attributes` belong to the type, `device_attributes` to each of its devices.
    """

    group: str
    bus: str
    device_api: str
    name: str = ""
    description: str = ""
    costs: Mapping[Pool, int] = field(default_factory=dict)
    attributes: Sequence[Attribute[Any]] = ()
    device_attributes: Sequence[Attribute[Any]] = ()
    #: Set when the parent is registered.
    parent: Parent = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not _GROUP.fullmatch(self.group):
            raise MdevError(errno.EINVAL, f"type group {self.group!r} is not a file name", self)
        self.costs = dict(self.costs)  # what is given back must be what was taken
        for pool, units in self.costs.items():
            if units < 1:
                raise MdevError(errno.EINVAL, f"type {self.group} cannot take {units} {pool.name}: 1 is the least", self)
        self.table = AttributeTable(self.attributes)
        self.device_table = DeviceTable(self.device_attributes)

    @property
    def id(self) -> str:
        """The name in sysfs and on the command line, e.g. ``mtty-2``."""
        return f"{self.parent.driver_name}-{self.group}"

    def __str__(self) -> str:
        return f"type {self.id}"

    @property
    def available_instances(self) -> int:
        """How many more can be created now."""
        return max(0, min((pool.free // units for pool, units in self.costs.items()), default=UNLIMITED))


class ParentOps:
    """Base of a parent driver's ops: subclass it, state `name` and `types`, implement ``parent_create`` and ``parent_remove``.

    One object serves one parent. See `mdevkit.hookspecs.ParentSpec` for the hooks.
    """

    #: The parent's name, unique over the registry: as under /sys/class/mdev_bus.
    name: str = ""
    #: The first part of type ids; the parent's name unless several parents share one driver (dev_driver_string).
    driver_name: str = ""
    #: Parents with the same key are functions of one card and run in one host; by default the name.
    host_key: str = ""
    types: Sequence[MdevType] = ()
    #: Attributes of the parent itself.
    attributes: Sequence[Attribute[Any]] = ()


class Parent:
    """A registered parent. `lock` guards its life cycle and the states of its devices; it is never held over a vendor call."""

    def __init__(self, ops: ParentOps, hooks: ParentHooks) -> None:
        self.ops = ops
        self.hooks = hooks
        self.name: str = ops.name
        self.driver_name: str = ops.driver_name or ops.name
        self.host_key: str = ops.host_key or ops.name
        self.lock = threading.Condition()
        self.table = AttributeTable(ops.attributes)
        #: By id.
        self.types: dict[str, MdevType] = {}
        #: Devices that are there, in the order they were created.
        self.mdevs: dict[UUID, Mdev] = {}
        #: Devices below the parent itself that are no mdevs, in the order they were added.
        self.children: dict[str, Device] = {}
        self.leaving = False
        #: Unregistered, or never was registered: its types are free for another parent.
        self.gone = False
        self.suspended = False
        #: See `Device.suspending`.
        self.suspending = False
        self._visitors: dict[int, int] = {}
        self._check_names()
        self._adopt(list(ops.types))

    def __str__(self) -> str:
        return f"parent {self.name}"

    def _check_names(self) -> None:
        if not self.name:
            raise MdevError(errno.EINVAL, f"parent {type(self.ops).__qualname__} has no name", self.ops)
        for name in (self.name, self.driver_name):
            if not _NAME.fullmatch(name):
                raise MdevError(errno.EINVAL, f"parent name {shown(name)} is not a file name", self.ops)

    def _adopt(self, types: Sequence[MdevType]) -> None:
        """Make the types ours, all or none."""
        if not types:
            raise MdevError(errno.EINVAL, f"{self} has no types", self.ops)
        groups: set[str] = set()
        for type_ in types:
            owner: Parent | None = getattr(type_, "parent", None)
            if owner is not None and not owner.gone:
                raise MdevError(errno.EBUSY, f"{self}: type {type_.group} already belongs to {owner}", self.ops)
            if type_.group in groups:
                raise MdevError(errno.EEXIST, f"{self}: type {type_.group} is stated twice", self.ops)
            groups.add(type_.group)
        for type_ in types:
            type_.parent = self
            self.types[type_.id] = type_

    def get_attribute(self, name: str) -> Any:
        """Read an attribute of the parent."""
        return self.table.read(name, self)

    def set_attribute(self, name: str, value: Any) -> None:
        """Check and set an attribute of the parent."""
        self.table.write(name, value, self)

    def enter(self) -> None:
        """Begin a create or remove; ENODEV when the parent is leaving. Pair with `exit`."""
        with self.lock:
            if self.leaving:
                raise MdevError(errno.ENODEV, f"{self} is being unregistered", self)
            ident = threading.get_ident()
            self._visitors[ident] = self._visitors.get(ident, 0) + 1

    def exit(self) -> None:
        """End what `enter` began."""
        with self.lock:
            ident = threading.get_ident()
            self._visitors[ident] -= 1
            if not self._visitors[ident]:
                del self._visitors[ident]
            self.lock.notify_all()

    def leave(self) -> None:
        """Refuse newcomers and wait for running creates and removes to end.

        ENODEV when somebody else is unregistering it, EDEADLK from inside a call of its own.
        """
        with self.lock:
            if threading.get_ident() in self._visitors:
                raise MdevError(errno.EDEADLK, f"{self} cannot be unregistered from inside its own create or remove", self)
            if self.leaving:
                raise MdevError(errno.ENODEV, f"{self} is being unregistered", self)
            self.leaving = True
            try:
                self.lock.wait_for(lambda: not self._visitors)
            except BaseException:
                self.stay()  # interrupted: everything goes on as before
                raise

    def stay(self) -> None:
        """Take back `leave`."""
        with self.lock:
            self.leaving = False
