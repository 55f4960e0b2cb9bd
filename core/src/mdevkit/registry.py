"""The registry: a running system of parents, buses, drivers and devices.

An ordinary object, as many per process as you like. It starts no thread and does no I/O of its own. Every method may be called
from any thread, also from inside a plugin's hook, with a defined result. Leaving it as a context manager removes devices,
parents, drivers and buses in that order.

Locks: one per parent (`Parent.lock`) guards its life cycle and its devices' states, one here guards the table of UUIDs and
the table of parents. Neither is held while a plugin is called, and no code holds both but to emit an event.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID, uuid4

from mdevkit.bus import Bus
from mdevkit.dd import DriverCore
from mdevkit.device import Device, Mdev, State
from mdevkit.dispatch import ParentHooks, check_wrapper
from mdevkit.driver import Driver
from mdevkit.errors import EPROBE_DEFER, MdevError
from mdevkit.events import Action, EventLog
from mdevkit.hints import missing_bus, no_parents
from mdevkit.names import parse_uuid
from mdevkit.parent import MdevType, Parent, ParentOps, release, reserve
from mdevkit.plugins import BUSES, PARENTS, WRAPPERS, Catalog, Plugin, driver_line, installed
from mdevkit.power import Power

log = logging.getLogger(__name__)


class Registry:
    """Loads plugins and owns everything.

    `plugins` are objects: `ParentOps`, `Bus`, `Driver`, or a wrapper (anything else whose hooks all wrap). `remove_timeout` is
    how many seconds a device's user gets to let go before a remove fails with EBUSY.
    """

    def __init__(self, plugins: Iterable[object] = (), *, catalog: Catalog | None = None, remove_timeout: float = 5.0) -> None:
        #: Everything that happens.
        self.events: Final = EventLog()
        #: What is installed; empty unless this registry discovers plugins.
        self.catalog: Final = catalog or Catalog(())
        self.remove_timeout = remove_timeout
        self._wrappers: Final[list[object]] = []
        self._core: Final = DriverCore(self.events, self._load_drivers, self._wrappers)
        self._power: Final = Power(self._core)
        self._lock: Final = threading.Lock()
        self._parents: Final[dict[str, Parent]] = {}
        #: Every UUID in use, from the start of its creation to the end of its release.
        self._uuids: Final[dict[UUID, Mdev]] = {}
        self._take(list(plugins))
        self._discover()

    @classmethod
    def discover(cls, *, remove_timeout: float = 5.0) -> Self:
        """Return a registry of the installed plugins: parents and wrappers loaded, buses and drivers loaded when needed.

        A plugin that fails is recorded in ``catalog.plugins`` and harms nobody else.
        """
        return cls(catalog=Catalog(installed()), remove_timeout=remove_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove devices (by force), parents, drivers and buses, and end the event log. May be called again."""
        for parent in reversed(list(self._parents.values())):
            self._attempt(lambda parent=parent: self.unregister_parent(parent.name))  # type: ignore[misc]
        for bus, name in list(self._core.drivers):
            self._attempt(lambda bus=bus, name=name: self._core.remove_driver(bus, name))  # type: ignore[misc]
        self._core.buses.clear()
        self.events.close()

    @staticmethod
    def _attempt(call: Callable[[], None]) -> None:
        try:
            call()
        except MdevError as error:
            log.error("%s", error)

    # -- plugins -------------------------------------------------------------------------------------------------------

    def _take(self, plugins: list[object]) -> None:
        """Register given plugins: wrappers first, since they wrap everything that comes after."""
        for plugin in plugins:
            if not isinstance(plugin, ParentOps | Bus | Driver):
                check_wrapper(plugin)
                self._wrappers.append(plugin)
        for plugin in plugins:
            if isinstance(plugin, Bus):
                self.register_bus(plugin)
            elif isinstance(plugin, Driver):
                self.register_driver(plugin)
            elif isinstance(plugin, ParentOps):
                self.register_parent(plugin)

    def _discover(self) -> None:
        for plugin in self.catalog.find(WRAPPERS):
            self._use(plugin, lambda product: self._take([product]))
        for plugin in self.catalog.find(PARENTS):
            self._use(plugin, self._register_parents)

    def _use(self, plugin: Plugin, register: Callable[[Any], object]) -> MdevError | None:
        """Load a plugin and register its product; what fails is recorded on the plugin and returned."""
        try:
            register(self.catalog.load(plugin))
        except MdevError as error:
            return error if error.subject is plugin else plugin.fail(str(error))
        return None

    def _register_parents(self, product: Any) -> None:
        """Register one ParentOps or several; all or none."""
        several: list[Any] = list(product) if isinstance(product, list | tuple) else [product]
        with ExitStack() as undo:
            for ops in several:
                parent = self.register_parent(ops)
                undo.callback(self.unregister_parent, parent.name)
            undo.pop_all()

    def _load_drivers(self, bus: str, wanted: str) -> MdevError | None:
        """Load the installed drivers for a match or of a name; return why one that should be there is not."""
        first: MdevError | None = None
        for lines in self.catalog.drivers(bus, wanted):
            driver = driver_line(lines[0].name)[0]
            if (bus, driver) not in self._core.drivers:
                error = self._use(lines[0], lambda product, lines=lines: self._register_late(product, lines))  # type: ignore[misc]
                first = first or error
        return first

    def _register_late(self, driver: Any, lines: list[Plugin]) -> None:
        """Register a driver that was found by its lines; EINVAL when they are not what it states itself."""
        name, bus, _ = driver_line(lines[0].name)
        matches = {driver_line(line.name)[2] for line in lines}
        if not isinstance(driver, Driver):
            raise MdevError(errno.EINVAL, f"{lines[0].entry.value}() returned {type(driver).__name__}, not a Driver")
        if (driver.name, driver.bus) != (name, bus):
            raise MdevError(errno.EINVAL, f"its entry point says {name} on bus {bus}, it says {driver.name} on {driver.bus}")
        if set(driver.id_table) != matches:
            table, stated = ", ".join(sorted(driver.id_table)), ", ".join(sorted(matches))
            raise MdevError(errno.EINVAL, f"its id table is {table or 'empty'}, its entry points say {stated}")
        self.register_driver(driver)

    # -- buses, drivers, parents ---------------------------------------------------------------------------------------

    def register_bus(self, bus: Bus) -> None:
        """Add a class bus: EEXIST, or EINVAL for a plugin that breaks the contract."""
        self._core.add_bus(bus)

    def register_driver(self, driver: Driver) -> None:
        """Add a driver: EEXIST, EINVAL. It gets devices that are created, bound or retried from now on."""
        self._core.add_driver(driver)

    def unregister_driver(self, bus: str, name: str) -> None:
        """Unbind a driver's devices, by force, and forget it; ENODEV."""
        self._core.remove_driver(bus, name)

    def register_parent(self, ops: ParentOps) -> Parent:
        """Add a parent (mdev_register_parent).

        EINVAL when it has no name, no types, or breaks the contract; EEXIST when a parent of that name is there.
        """
        if not isinstance(ops, ParentOps):
            raise MdevError(errno.EINVAL, f"{ops!r} is not a ParentOps object", ops)
        if not ops.name or not ops.types:
            raise MdevError(errno.EINVAL, f"parent {type(ops).__qualname__} has no {'types' if ops.name else 'name'}", ops)
        hooks = ParentHooks(ops, self._wrappers)
        with self._lock:
            if ops.name in self._parents:
                raise MdevError(errno.EEXIST, f"parent {ops.name} is already registered", ops)
            parent = self._parents[ops.name] = Parent(ops, hooks)
            self.events.emit(Action.CHANGE, parent.name, {"MDEV_STATE": "registered"})
        return parent

    def unregister_parent(self, name: str) -> None:
        """Remove a parent and, by force, every device of it.

        New creates get ENODEV at once, running ones are waited for. EDEADLK from inside the parent's own create or remove.
        """
        parent = self.parent(name)
        if any(mdev.claimed_here for mdev in list(parent.mdevs.values())):
            raise MdevError(errno.EDEADLK, f"{parent} cannot be unregistered from inside a call to one of its devices", parent)
        parent.leave()
        for mdev in reversed(list(parent.mdevs.values())):
            self._attempt(lambda mdev=mdev: self._remove(mdev, 0.0, force=True))  # type: ignore[misc]
        self._attempt(lambda: parent.hooks.unregister(parent))
        with self._lock:
            del self._parents[name]
            self.events.emit(Action.CHANGE, name, {"MDEV_STATE": "unregistered"})

    def bus(self, name: str, wanted_by: object = None) -> Bus:
        """Return a class bus, loading its plugin if need be; ENODEV says which package brings it."""
        if name not in self._core.buses:
            for plugin in self.catalog.find(BUSES, name):
                if error := self._use(plugin, self.register_bus):
                    raise error
        if name not in self._core.buses:
            raise missing_bus(name, wanted_by or "registry")
        return self._core.buses[name].bus

    # -- looking -------------------------------------------------------------------------------------------------------

    @property
    def parents(self) -> list[Parent]:
        """The registered parents, in the order they came."""
        with self._lock:
            return list(self._parents.values())

    @property
    def types(self) -> list[MdevType]:
        """Every type of every parent."""
        return [type_ for parent in self.parents for type_ in parent.types.values()]

    @property
    def buses(self) -> list[Bus]:
        """The class buses loaded so far."""
        return [hooks.bus for hooks in list(self._core.buses.values())]

    @property
    def drivers(self) -> list[Driver]:
        """The drivers loaded so far."""
        return [hooks.driver for hooks in list(self._core.drivers.values())]

    @property
    def mdevs(self) -> list[Mdev]:
        """The devices that are there, parent by parent."""
        return [mdev for parent in self.parents for mdev in list(parent.mdevs.values())]

    def parent(self, name: str) -> Parent:
        """Return a parent; ENODEV with the names there are."""
        try:
            return self._parents[name]
        except KeyError:
            known = ", ".join(self._parents)
            raise MdevError(errno.ENODEV, f"there is no parent {name!r} (there are: {known or 'none'})", name) from None

    def type(self, type_id: str, parent: str | None = None) -> MdevType:
        """Return a type by its id, of the given parent or of the first that has room; ENODEV with the ids there are."""
        known = [type_ for owner in ([self.parent(parent)] if parent else self.parents) for type_ in owner.types.values()]
        found = [type_ for type_ in known if type_.id == type_id]
        if not found:
            ids = ", ".join(sorted({type_.id for type_ in known}))
            where = f" of parent {parent}" if parent else ""
            hint = f" (there are: {ids})" if ids else f"; {no_parents()}"
            raise MdevError(errno.ENODEV, f"there is no type {type_id!r}{where}{hint}", type_id)
        return next((type_ for type_ in found if type_.available_instances), found[0])

    def get(self, uuid: UUID | str) -> Mdev:
        """Return the device of a UUID: ENODEV when there is none (a device still being created is not there yet)."""
        wanted = parse_uuid(uuid)
        mdev = self._uuids.get(wanted)
        if mdev is None or mdev.state in {State.CREATING, State.GONE}:
            raise MdevError(errno.ENODEV, f"there is no device {wanted}", wanted)
        return mdev

    def find(self, prefix: str) -> Mdev:
        """Return the device whose UUID starts with `prefix`: ENODEV when none does, EINVAL when several do."""
        found = [mdev for mdev in self.mdevs if mdev.name.startswith(prefix.lower())]
        if len(found) > 1:
            raise MdevError(errno.EINVAL, f"{prefix!r} is the beginning of {len(found)} devices' UUIDs", prefix)
        return found[0] if found else self.get(prefix)

    # -- life cycle of devices -----------------------------------------------------------------------------------------

    def create(
        self,
        type_id: str,
        *,
        uuid: UUID | str | None = None,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        bind: bool = True,
        driver_override: str | None = None,
        endpoint_path: str | None = None,
    ) -> Mdev:
        """Create a device of a type; all or nothing.

        With `bind` a driver must take it, or the create fails with the driver's error and is rolled back; a driver that asks to be
        deferred is no failure. Without, it stays unbound. Errors: EINVAL (UUID, parameter value, class not set), ENOENT
        (parameter), ENODEV (type, parent, bus, driver, parent leaving), EEXIST (UUID in use), ENOSPC (no instance; says who
        holds them), or what vendor and driver raise.
        """
        type_ = self.type(type_id, parent)
        wanted = uuid4() if uuid is None else parse_uuid(uuid)
        checked = type_.device_table.parameters(params or {}, type_)
        bus = self.bus(type_.bus, type_)
        type_.parent.enter()
        try:
            mdev = bus.device_class(wanted, type_, checked)
            mdev.driver_override, mdev.endpoint_path = driver_override, endpoint_path
            trigger = self._core.trigger
            with ExitStack() as undo:
                self._build(mdev, undo)
                if bind:
                    self._first_probe(mdev)
                undo.pop_all()
            self._publish(mdev)
        finally:
            type_.parent.exit()
        self._core.retry_since(trigger, mdev)
        return mdev

    def _build(self, mdev: Mdev, undo: ExitStack) -> None:
        """Reserve the UUID and the instance and let the vendor create; `undo` takes it back."""
        self._reserve_uuid(mdev)
        undo.callback(self._release_uuid, mdev)
        reserve(mdev.type.costs, mdev.name, mdev.type)
        undo.callback(release, mdev.type.costs, mdev.name)
        mdev.parent.hooks.create(mdev, mdev.params)
        undo.callback(self._attempt, lambda: mdev.parent.hooks.remove(mdev))
        if not mdev.class_id:
            raise MdevError(errno.EINVAL, f"{mdev}: {mdev.parent} set no class and ops in its create", mdev)

    def _first_probe(self, mdev: Mdev) -> None:
        """Bind a device that is being created; a deferral is left in ``mdev.error``."""
        try:
            self._core.probe_any(mdev)
        except MdevError as error:
            if error.errno != EPROBE_DEFER:
                raise
            mdev.error = error

    def _publish(self, mdev: Mdev) -> None:
        """Let everybody see a device whose creation cannot fail any more."""
        env = self._core.uevent(mdev)
        with mdev.lock:
            mdev.parent.mdevs[mdev.uuid] = mdev
            self.events.emit(Action.ADD, mdev.name, env)
            if mdev.driver is not None:
                mdev.settle(State.BOUND)
                self.events.emit(Action.BIND, mdev.name, {**env, "DRIVER": mdev.driver})
            elif mdev.error is not None:
                self._core.defer(mdev)
            else:
                mdev.settle(State.UNBOUND)

    def _reserve_uuid(self, mdev: Mdev) -> None:
        with self._lock:
            holder = self._uuids.setdefault(mdev.uuid, mdev)
        if holder is not mdev:
            message = f"UUID {mdev.uuid} is in use by a device of {holder.type} on {holder.parent}"
            raise MdevError(errno.EEXIST, message, holder)

    def _release_uuid(self, mdev: Mdev) -> None:
        with self._lock:
            del self._uuids[mdev.uuid]

    def remove(self, uuid: UUID | str, *, force: bool = False, timeout: float | None = None) -> None:
        """Remove a device: unbind its driver, call the vendor, release.

        A user of the device is asked to let go and gets `timeout` seconds (`remove_timeout` by default), then EBUSY names it;
        `force` closes it instead. ENODEV: no such device, or its parent is leaving. EAGAIN: a create or remove of it is running.
        """
        wanted = parse_uuid(uuid)
        mdev = self._uuids.get(wanted)
        if mdev is None:
            raise MdevError(errno.ENODEV, f"there is no device {wanted}", wanted)
        mdev.parent.enter()
        try:
            self._remove(mdev, self.remove_timeout if timeout is None else timeout, force=force)
        finally:
            mdev.parent.exit()

    def _remove(self, mdev: Mdev, timeout: float, *, force: bool) -> None:
        before = mdev.claim(State.REMOVING)
        try:
            self._core.let_go(mdev, timeout, force)
        except MdevError:
            mdev.settle(before)
            raise
        env = self._core.uevent(mdev)
        self._core.withdraw(mdev)
        self._attempt(lambda: mdev.parent.hooks.remove(mdev))
        release(mdev.type.costs, mdev.name)
        with mdev.lock:
            del mdev.parent.mdevs[mdev.uuid]
            mdev.settle(State.GONE)
            self.events.emit(Action.REMOVE, mdev.name, env)
        self._release_uuid(mdev)

    # -- binding -------------------------------------------------------------------------------------------------------

    def attach(self, uuid: UUID | str) -> None:
        """Find a driver for an unbound device: EBUSY when bound, ENODEV when none matches, or the driver's error."""
        self._core.attach(self.get(uuid))

    def bind(self, uuid: UUID | str, driver: str, *, override: bool = False) -> None:
        """Bind a device to a driver by hand; with `override`, set driver_override first (and keep it only if that works).

        ENODEV: no such device or driver, another bus, or no match. EBUSY: it is bound already.
        """
        mdev = self.get(uuid)
        before = mdev.driver_override
        if override:
            mdev.driver_override = driver
        try:
            self._core.bind(mdev, driver)
        except MdevError:
            mdev.driver_override = before
            raise

    def unbind(self, uuid: UUID | str, *, force: bool = False, timeout: float | None = None) -> None:
        """Take a device from its driver: ENODEV when it has none, EBUSY when its user holds on."""
        self._core.unbind(self.get(uuid), self.remove_timeout if timeout is None else timeout, force)

    def set_driver_override(self, uuid: UUID | str, driver: str | None) -> None:
        """Let only the driver of that name bind the device, whatever its id table; None or "" clears it."""
        self.get(uuid).driver_override = driver or None

    def add_device(self, device: Device) -> None:
        """Add a device that is no mdev (device_add): ADD, then a driver is looked for; none is no failure. EEXIST."""
        self.bus(device.bus, device)
        self._core.add_device(device)

    def del_device(self, device: Device) -> None:
        """Take away what `add_device` added, by force; EAGAIN when somebody else is about it."""
        self._core.del_device(device)

    # -- power ---------------------------------------------------------------------------------------------------------

    def suspend(self, target: UUID | str | None = None) -> None:
        """Suspend a device, a parent with its devices, or everything: children before parents.

        The error of a driver that refuses is raised after what was suspended has been resumed. While everything is
        suspended, probes are deferred.
        """
        self._power.suspend(self._power_targets(target), everything=target is None)

    def resume(self, target: UUID | str | None = None) -> None:
        """Resume what is suspended: parents before children. The first error is raised at the end."""
        self._power.resume(self._power_targets(target), everything=target is None)

    def _power_targets(self, target: UUID | str | None) -> list[Parent | Mdev]:
        if target is None:
            return list(self.parents)
        if isinstance(target, str) and target in self._parents:
            return [self._parents[target]]
        return [self.get(target)]
