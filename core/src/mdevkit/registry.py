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
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID, uuid4

from mdevkit.bus import Bus
from mdevkit.dd import DriverCore, check_id_table
from mdevkit.device import Device, Mdev, State
from mdevkit.dispatch import ParentHooks, check_wrapper, quietly
from mdevkit.driver import Driver
from mdevkit.errors import EPROBE_DEFER, Guard, MdevError, brief, shown
from mdevkit.events import Action, EventLog
from mdevkit.hints import install_parents, missing_bus
from mdevkit.names import parse_uuid
from mdevkit.parent import MdevType, Parent, ParentOps, release, reserve
from mdevkit.plugins import BUSES, DRIVERS, PARENTS, WRAPPERS, Catalog, Plugin, Status, driver_line, installed
from mdevkit.power import Power
from mdevkit.sockets import Listen, listen_at

log = logging.getLogger(__name__)

_UUID_LENGTH = 36


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
        #: Becomes `Mdev.listen` of every device created from now on.
        self.listen: Listen = listen_at
        self._wrappers: Final[list[object]] = []
        self._core: Final = DriverCore(self.events, self._load_drivers, self._wrappers)
        self._power: Final = Power(self._core)
        self._lock: Final = threading.Lock()
        self._parents: Final[dict[str, Parent]] = {}
        #: Every UUID in use, from the start of its creation to the end of its release.
        self._uuids: Final[dict[UUID, Mdev]] = {}
        try:
            self._take(list(plugins))
        except BaseException:
            self.close()  # who gets no registry cannot close it, and its parents' types would belong to it for ever
            raise

    @classmethod
    def discover(cls, *, remove_timeout: float = 5.0) -> Self:
        """Return a registry of the installed plugins: parents and wrappers loaded, buses and drivers loaded when needed.

        A plugin that fails is recorded in ``catalog.plugins`` and harms nobody else.
        """
        registry = cls(catalog=Catalog(installed()), remove_timeout=remove_timeout)
        for group in (WRAPPERS, PARENTS):
            for plugin in registry.catalog.find(group):
                quietly(partial(registry.use, plugin))
        return registry

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove devices (by force), parents, drivers and buses, and end the event log. May be called again."""
        for parent in reversed(list(self._parents.values())):
            quietly(partial(self.unregister_parent, parent.name))
        for device in reversed(self._core.devices):
            quietly(partial(self.del_device, device))
        for bus, name in list(self._core.drivers):
            quietly(partial(self._core.remove_driver, bus, name))
        self._core.buses.clear()
        self.events.close()

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

    def use(self, plugin: Plugin) -> None:
        """Load an installed plugin and register what it brings; a failure is recorded on the plugin and raised.

        One that is in use already raises EEXIST, which is no failing of the plugin.
        """
        register: dict[str, Callable[[Any], object]] = {
            PARENTS: self._register_parents,
            BUSES: lambda product: self._register_found_bus(product, plugin),
            DRIVERS: lambda product: self._register_late(product, self.catalog.lines(plugin)),
            WRAPPERS: self._register_wrapper,
        }
        with self.catalog.lock:
            loaded = plugin.status is Status.LOADED
            product = self.catalog.load(plugin)
            try:
                with Guard(f"{plugin.entry.value}() returned what cannot be registered"):
                    register.get(plugin.group, lambda _product: None)(product)
            except MdevError as error:
                if loaded:
                    raise
                raise plugin.fail(str(error)) from error

    def _register_wrapper(self, product: Any) -> None:
        check_wrapper(product)
        if any(wrapper is product for wrapper in self._wrappers):
            raise MdevError(errno.EEXIST, f"wrapper {type(product).__qualname__} is already registered", product)
        self._wrappers.append(product)

    def _register_found_bus(self, product: Any, plugin: Plugin) -> None:
        if not isinstance(product, Bus):
            raise MdevError(errno.EINVAL, f"{plugin.entry.value}() returned {_kind(product)}, not a Bus")
        if product.name != plugin.name:
            raise MdevError(errno.EINVAL, f"its entry point says bus {plugin.name}, it says {product.name}")
        self.register_bus(product)

    def _register_parents(self, product: Any) -> list[Parent]:
        """Register one ParentOps or several; all or none.

        Nobody sees the first before the last is checked: to take one back, its running creates would have to be waited for, and
        they may wait for the catalog, which is locked here.
        """
        several: list[Any] = list(product) if isinstance(product, list | tuple) else [product]
        made: list[Parent] = []
        try:
            for ops in several:
                made.append(self._make_parent(ops))  # noqa: PERF401  (if one fails, those made before it must be known)
            self._show_parents(made)
        except BaseException:
            for parent in made:
                parent.gone = True
            raise
        return made

    def _load_drivers(self, bus: str, wanted: str) -> MdevError | None:
        """Load the installed drivers for a match or of a name; return why one that should be there is not."""
        first: MdevError | None = None
        for lines in self.catalog.drivers(bus, wanted):
            key = bus, driver_line(lines[0].name)[0]
            if key not in self._core.drivers:
                try:
                    with self.catalog.lock:
                        if key not in self._core.drivers:
                            self.use(lines[0])
                except MdevError as error:
                    first = first or brief(error)
                for line in lines:
                    line.status, line.reason, line.product = lines[0].status, lines[0].reason, lines[0].product
        return first

    def _register_late(self, driver: Any, lines: list[Plugin]) -> None:
        """Register a driver that was found by its lines; EINVAL when they are not what it states itself."""
        name, bus, _ = driver_line(lines[0].name)
        matches = {driver_line(line.name)[2] for line in lines}
        if not isinstance(driver, Driver):
            raise MdevError(errno.EINVAL, f"{lines[0].entry.value}() returned {_kind(driver)}, not a Driver")
        if (driver.name, driver.bus) != (name, bus):
            raise MdevError(errno.EINVAL, f"its entry point says {name} on bus {bus}, it says {driver.name} on {driver.bus}")
        check_id_table(driver)
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
        """Unbind a driver's devices, by force, and forget it: ENODEV; EAGAIN while one of them is being created or removed."""
        self._core.remove_driver(bus, name)

    def register_parent(self, ops: ParentOps) -> Parent:
        """Add a parent (mdev_register_parent).

        EINVAL when it has no name, no types, or breaks the contract; EEXIST when a parent of that name is there.
        """
        return self._register_parents([ops])[0]

    def _make_parent(self, ops: ParentOps) -> Parent:
        """Check what a vendor gave and make a parent of it that nobody sees yet."""
        if not isinstance(ops, ParentOps):
            raise MdevError(errno.EINVAL, f"a parent is wanted, not {_kind(ops)}", ops)
        with Guard(f"parent {type(ops).__qualname__} cannot be registered", ops):
            self._check_new(ops.name, ops, self._parents)
            return Parent(ops, ParentHooks(ops, self._wrappers))

    def _show_parents(self, made: list[Parent]) -> None:
        """Let everybody see new parents, all or none."""
        with self._lock:
            taken = set(self._parents)
            for parent in made:
                self._check_new(parent.name, parent.ops, taken)
                taken.add(parent.name)
            for parent in made:
                self._parents[parent.name] = parent
                self.events.emit(Action.CHANGE, parent.name, {"MDEV_STATE": "registered"})

    @staticmethod
    def _check_new(name: str, ops: ParentOps, taken: Collection[str]) -> None:
        if name in taken:
            raise MdevError(errno.EEXIST, f"parent {name} is already registered", ops)

    def unregister_parent(self, name: str) -> None:
        """Remove a parent and, by force, every device of it.

        New creates get ENODEV at once, running ones are waited for. EDEADLK from inside a call to the
        parent or one of its devices, an attribute's too.
        """
        parent = self.parent(name)
        mdevs, others = list(parent.mdevs.values()), list(parent.children.values())
        if any(device.claimed_here for device in others) or any(mdev.claimed_here or mdev.in_attribute_here for mdev in mdevs):
            raise MdevError(errno.EDEADLK, f"{parent} cannot be unregistered from inside a call to one of its devices", parent)
        parent.leave()
        try:
            for mdev in reversed(list(parent.mdevs.values())):
                quietly(partial(self._remove, mdev, 0.0, force=True))
            quietly(lambda: parent.hooks.unregister(parent))
            self._core.del_children(parent)
        except BaseException:
            parent.stay()  # interrupted: what is left can be unregistered again
            raise
        with self._lock:
            del self._parents[name]
            parent.gone = True
            self.events.emit(Action.CHANGE, name, {"MDEV_STATE": "unregistered"})

    def bus(self, name: str, wanted_by: object = None) -> Bus:
        """Return a class bus, loading its plugin if need be; ENODEV says which package brings it, ENOEXEC why it does not work."""
        refused = None
        if name not in self._core.buses:
            with self.catalog.lock:
                for plugin in (self.catalog.find(BUSES, name) or self.catalog.unusable(BUSES, name))[:1]:
                    try:
                        if name not in self._core.buses:
                            self.use(plugin)
                    except MdevError as error:
                        refused = brief(error)
        try:
            return self._core.buses[name].bus
        except KeyError:
            raise missing_bus(name, wanted_by or "registry", refused) from None

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
        return self._types(type_id, parent)[0]

    def _types(self, type_id: str, parent: str | None) -> list[MdevType]:
        """Return the types of an id, those with room first; ENODEV when there is none."""
        owners = [self.parent(parent)] if parent else self.parents
        found = [owner.types[type_id] for owner in owners if type_id in owner.types]
        if not found:
            where = f" of parent {parent}" if parent else ""
            raise MdevError(errno.ENODEV, f"there is no type {type_id!r}{where}{self._type_hint(owners)}", type_id)
        return sorted(found, key=lambda type_: (type_.parent.leaving, not type_.available_instances))

    def _type_hint(self, owners: list[Parent]) -> str:
        ids = ", ".join(sorted({type_id for owner in owners for type_id in owner.types}))
        known = f" (there are: {ids})" if ids else f": no parent is installed {install_parents()}"
        broken = [f"; {plugin} cannot be used: {plugin.reason}" for plugin in self.catalog.unusable(PARENTS)]
        return known + "".join(broken)

    def get(self, uuid: UUID | str) -> Mdev:
        """Return the device of a UUID: ENODEV when there is none (a device still being created is not there yet)."""
        wanted = parse_uuid(uuid)
        mdev = self._uuids.get(wanted)
        if mdev is None or mdev.state in {State.CREATING, State.GONE}:
            raise MdevError(errno.ENODEV, f"there is no device {wanted}", wanted)
        return mdev

    def find(self, prefix: str) -> Mdev:
        """Return the device whose UUID starts with `prefix`: ENODEV when none does, EINVAL when several do, or for no prefix."""
        if len(prefix) == _UUID_LENGTH:
            return self.get(prefix)
        if not prefix:
            raise MdevError(errno.EINVAL, "a UUID or the beginning of one is wanted, not nothing", prefix)
        found = [mdev for mdev in self.mdevs if mdev.name.startswith(prefix.lower())]
        if len(found) > 1:
            some = ", ".join(mdev.name for mdev in found[:4]) + (", ..." if len(found) > 4 else "")
            raise MdevError(errno.EINVAL, f"{prefix!r} is the beginning of {len(found)} devices' UUIDs: {some}", prefix)
        if not found:
            raise MdevError(errno.ENODEV, f"there is no device {shown(prefix)}", prefix)
        return found[0]

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
        wanted = uuid4() if uuid is None else parse_uuid(uuid)
        create = partial(
            self._create, uuid=wanted, params=params or {}, bind=bind, override=driver_override, endpoint_path=endpoint_path
        )
        *others, last = self._types(type_id, parent)
        for type_ in others:
            try:
                return create(type_)
            except MdevError as error:
                # Full, or about to leave, since we looked: the next parent may do.
                if error.errno not in {errno.ENOSPC, errno.ENODEV} or error.subject not in (type_, type_.parent):
                    raise
        return create(last)

    def _create(
        self, type_: MdevType, uuid: UUID, params: Mapping[str, Any], bind: bool, override: str | None, endpoint_path: str | None
    ) -> Mdev:
        checked = type_.device_table.parameters(params, type_)
        bus = self.bus(type_.bus, type_)
        type_.parent.enter()
        try:
            with Guard(f"{type_}: create failed", type_):
                mdev = bus.device_class(uuid, type_, checked)
            mdev.driver_override, mdev.endpoint_path = override or None, endpoint_path
            mdev.listen, mdev.registry, mdev.held = self.listen, self, []
            trigger = self._core.trigger
            with ExitStack() as undo:
                self._build(mdev, undo)
                if bind:
                    undo.callback(self._core.release, mdev)
                    self._first_probe(mdev)
                env = self._core.uevent(mdev)
                while not self._publish(mdev, env, undo):
                    self._core.put_off(mdev)
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
        undo.callback(self._core.del_children, mdev)
        mdev.parent.hooks.create(mdev, mdev.params)
        undo.callback(self._unmake, mdev)
        if not mdev.class_id:
            raise MdevError(errno.EINVAL, f"{mdev}: {mdev.parent} set no class and ops in its create", mdev)

    @staticmethod
    def _unmake(mdev: Mdev) -> None:
        """Take back the vendor's create of a device whose creation failed later."""
        try:
            mdev.depart()
        finally:
            quietly(lambda: mdev.parent.hooks.remove(mdev))

    def _first_probe(self, mdev: Mdev) -> None:
        """Bind a device that is being created; a deferral is left in ``mdev.error``."""
        try:
            self._core.probe_any(mdev)
        except MdevError as error:
            if error.errno != EPROBE_DEFER:
                raise
            mdev.error = brief(error)

    def _publish(self, mdev: Mdev, env: dict[str, str], undo: ExitStack) -> bool:
        """Let everybody see a device whose creation cannot fail any more; not one that would run below what sleeps.

        Events come in device_add's order: the device, what its vendor and its driver's probe added below it, its binding.
        """
        with mdev.lock:
            if mdev.driver is not None and self._core.asleep(mdev):
                return False
            undo.pop_all()
            mdev.parent.mdevs[mdev.uuid] = mdev
            held, mdev.held = mdev.held or (), None
            self.events.emit(Action.ADD, mdev.name, env)
            for tell in held:
                tell()
            if mdev.driver is not None:
                mdev.settle(State.BOUND)
                self.events.emit(Action.BIND, mdev.name, {**env, "DRIVER": mdev.driver})
            elif mdev.error is not None:
                self._core.defer(mdev)
            else:
                mdev.settle(State.UNBOUND)
            return True

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
            env = self._core.uevent(mdev)
        except BaseException:
            mdev.settle(before)
            raise
        with ExitStack() as steps:  # last first, and each whatever becomes of the others
            steps.callback(self._release_uuid, mdev)
            steps.callback(self._retire, mdev, env)
            steps.callback(release, mdev.type.costs, mdev.name)
            steps.callback(self._core.del_children, mdev)
            steps.callback(quietly, lambda: mdev.parent.hooks.remove(mdev))
            try:
                mdev.depart()
            finally:
                self._core.withdraw(mdev)

    def _retire(self, mdev: Mdev, env: dict[str, str]) -> None:
        with mdev.lock:
            del mdev.parent.mdevs[mdev.uuid]
            mdev.settle(State.GONE)
            self.events.emit(Action.REMOVE, mdev.name, env)

    # -- binding -------------------------------------------------------------------------------------------------------

    def attach(self, uuid: UUID | str) -> None:
        """Find a driver for an unbound device: EBUSY when bound, ENODEV when none matches, or the driver's error."""
        self._core.attach(self.get(uuid))

    def bind(self, uuid: UUID | str, driver: str, *, override: bool = False) -> None:
        """Bind a device to a driver by hand; with `override`, set driver_override first (and keep it only if that works).

        ENODEV: no such device or driver, another bus, or no match. EBUSY: it is bound already.
        """
        self._core.bind(self.get(uuid), driver, override=override)

    def unbind(self, uuid: UUID | str, *, force: bool = False, timeout: float | None = None) -> None:
        """Take a device from its driver: ENODEV when it has none, EBUSY when its user holds on."""
        self._core.unbind(self.get(uuid), self.remove_timeout if timeout is None else timeout, force)

    def set_driver_override(self, uuid: UUID | str, driver: str | None) -> None:
        """Let only the driver of that name bind the device, whatever its id table; None or "" clears it."""
        self._core.set_override(self.get(uuid), driver or None)

    def add_device(self, device: Device) -> None:
        """Add a device that is no mdev (device_add): ADD, then a driver is looked for; none is no failure. EEXIST."""
        self.bus(device.bus, device)
        device.registry = self
        self._core.add_device(device)

    def del_device(self, device: Device) -> None:
        """Take away what `add_device` added, by force; EAGAIN when somebody else is about it."""
        self._core.del_device(device)

    # -- power ---------------------------------------------------------------------------------------------------------

    def suspend(self, target: UUID | str | None = None) -> None:
        """Suspend a device, a parent with its devices, or everything: children before parents.

        The error of a driver that refuses is raised after what was suspended has been resumed. From the beginning, probes at and
        below what is suspended are deferred. A removal whose user may yet hold on is waited for.
        """
        self._power.suspend(partial(self._power_targets, target), everything=target is None)

    def resume(self, target: UUID | str | None = None) -> None:
        """Resume what is suspended: parents before children. The first error is raised at the end."""
        self._power.resume(partial(self._power_targets, target), everything=target is None)

    def _power_targets(self, target: UUID | str | None) -> list[Parent | Device]:
        if target is None:
            # What stands on its own comes first, and sleeps last: parents may stand on it.
            return [*(device for device in self._core.devices if device.parent is None), *self.parents]
        if isinstance(target, str) and target in self._parents:
            return [self._parents[target]]
        if isinstance(target, str) and len(target) != _UUID_LENGTH:
            raise MdevError(errno.ENODEV, f"there is no device or parent {shown(target)}", target)
        return [self.get(target)]


def _kind(value: object) -> str:
    """Say what a value is that is not what was wanted."""
    if isinstance(value, type):
        return f"the class {value.__qualname__} (an instance is wanted)"
    return f"a {type(value).__qualname__} object"
