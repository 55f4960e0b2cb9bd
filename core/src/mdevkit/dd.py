"""Driver binding (drivers/base/dd.c): which driver gets a device, deferred probe, bind and unbind.

`DriverCore` holds the buses and drivers of one registry. It changes a device's state only through `Device.claim` and
`Device.settle`, so no lock is held while a driver runs, and any thread may call. Probing order: the override alone if one is
set, else every matching driver by name; the first whose probe succeeds wins. A probe that asks to be deferred parks the device
until another bind succeeds anywhere in the registry, or something is resumed; the thread that did it retries the parked ones.

No wake-up is lost: who probes reads the trigger before and compares after parking, and who binds or resumes counts the trigger
up before looking at what is parked. What is bound below a device that is being probed counts when that is bound, else a probe
that adds a device and then asks to be deferred would wake itself for ever (Linux forbids it, and loops). An interrupt
(KeyboardInterrupt in a plugin's code) leaves every device in a state it can rest in.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

from mdevkit.device import Device, State
from mdevkit.dispatch import BusHooks, DriverHooks, quietly
from mdevkit.errors import EPROBE_DEFER, Guard, MdevError, ProbeDeferredError, brief, shown
from mdevkit.events import Action, EventLog
from mdevkit.hints import missing_driver
from mdevkit.parent import Parent

if TYPE_CHECKING:
    from mdevkit.bus import Bus
    from mdevkit.driver import Driver

log = logging.getLogger(__name__)

#: Loads what is installed for a bus and a match (or a driver's name), and returns the error of a plugin that failed.
LoadDrivers = Callable[[str, str], MdevError | None]


def check_id_table(driver: Driver) -> None:
    """Raise EINVAL for an id table that buses could not search."""
    table: object = driver.id_table
    if isinstance(table, str) or not isinstance(table, Sequence) or not all(isinstance(entry, str) for entry in table):
        text = f"driver {driver.name}: its id table {shown(table)} is not a sequence of strings"
        raise MdevError(errno.EINVAL, text, driver)


class DriverCore:
    """Buses, drivers and the binding between drivers and devices."""

    def __init__(self, events: EventLog, load_drivers: LoadDrivers, wrappers: list[object]) -> None:
        #: By name.
        self.buses: Final[dict[str, BusHooks]] = {}
        #: By bus and name.
        self.drivers: Final[dict[tuple[str, str], DriverHooks]] = {}
        #: While set, every probe is deferred.
        self.suspended = False
        self._events: Final = events
        self._load_drivers: Final = load_drivers
        self._wrappers: Final = wrappers
        #: What each driver has bound or is probing: a driver that is at work cannot be forgotten.
        self._taken: Final[dict[tuple[str, str], dict[str, Device]]] = {}
        #: Drivers that are being removed: they get no new device.
        self._leaving: Final[set[tuple[str, str]]] = set()
        self._devices: Final[dict[tuple[str, str], Device]] = {}
        self._lock: Final = threading.Lock()
        self._deferred: Final[dict[Device, None]] = {}
        #: Counts successful binds and resumes: a probe that was deferred across one is tried again at once.
        self._trigger = 0
        self._retrying = False
        self._again = False

    # -- buses and drivers ---------------------------------------------------------------------------------------------

    def add_bus(self, bus: Bus) -> None:
        """Register a class bus: EEXIST for a name that is taken, EINVAL for a plugin that breaks the contract."""
        with Guard(f"bus {type(bus).__qualname__} cannot be registered", bus):
            name, hooks = bus.name, BusHooks(bus, self._wrappers)
        if not name:
            raise MdevError(errno.EINVAL, f"bus {type(bus).__qualname__} has no name", bus)
        with self._lock:
            if name in self.buses:
                raise MdevError(errno.EEXIST, f"bus {name} is already registered", bus)
            self.buses[name] = hooks

    def add_driver(self, driver: Driver) -> None:
        """Register a driver: EEXIST, EINVAL as for a bus. Devices are bound to it when they ask, not here."""
        with Guard(f"driver {type(driver).__qualname__} cannot be registered", driver):
            bus, name, hooks = driver.bus, driver.name, DriverHooks(driver, self._wrappers)
            if not name or not bus:
                raise MdevError(errno.EINVAL, f"driver {type(driver).__qualname__} has no name or no bus", driver)
            check_id_table(driver)
        with self._lock:
            if (bus, name) in self.drivers:
                raise MdevError(errno.EEXIST, f"driver {name} is already registered on bus {bus}", driver)
            self.drivers[bus, name] = hooks
            self._taken[bus, name] = {}

    def remove_driver(self, bus: str, name: str) -> None:
        """Unbind every device of a driver, by force, then forget it.

        ENODEV if there is none; EAGAIN while a device it has bound is being created or removed.
        """
        key = bus, name
        with self._lock:
            if key not in self.drivers:
                raise MdevError(errno.ENODEV, f"there is no driver {name} on bus {bus}", name)
            self._leaving.add(key)
        try:
            while devices := self._drop_if_idle(key):
                for device in devices:
                    self._unbind_from(device, name)
        finally:
            with self._lock:
                self._leaving.discard(key)

    def _drop_if_idle(self, key: tuple[str, str]) -> list[Device]:
        """Forget a driver that has nothing in hand, else return what it has."""
        with self._lock:
            devices = list(self._taken.get(key, {}).values())
            if not devices:
                self.drivers.pop(key, None)
                self._taken.pop(key, None)
            return devices

    def _unbind_from(self, device: Device, driver: str) -> None:
        try:
            self.unbind(device, timeout=0.0, force=True, driver=driver)
        except MdevError as error:
            if error.errno != errno.ENODEV:  # ENODEV: it has let go of the device meanwhile
                raise

    def bus(self, name: str) -> BusHooks:
        """Return a bus; ENODEV when it is not there."""
        try:
            return self.buses[name]
        except KeyError:
            raise MdevError(errno.ENODEV, f"there is no bus {name}", name) from None

    # -- matching ------------------------------------------------------------------------------------------------------

    def candidates(self, device: Device) -> Iterator[DriverHooks]:
        """Yield the drivers to try if they match: the override alone, which need not, or those of the bus, by name."""
        if device.driver_override is not None:
            yield self._named(device, device.driver_override)
            return
        with self._lock:
            here = sorted(name for on, name in self.drivers if on == device.bus)
        for name in here:
            hooks = self.drivers.get((device.bus, name))
            if hooks is not None:
                yield hooks

    def _suits(self, device: Device, hooks: DriverHooks) -> bool:
        """Whether a candidate is to probe a device. One that cannot be matched is named; its error is one candidate's, no more."""
        if device.driver_override is not None:
            return True
        bus = self.bus(device.bus)
        try:
            return bus.match(device, hooks.driver)
        except MdevError as error:
            name = hooks.driver.name
            log.error("driver %s is passed over: %s", name, error)
            raise MdevError(error.errno or errno.EIO, f"driver {name}: {error}", device) from error

    # -- devices that are no mdevs -------------------------------------------------------------------------------------

    def add_device(self, device: Device) -> None:
        """See `Registry.add_device`."""
        key = device.bus, device.name
        with self._lock:
            if key in self._devices:
                raise MdevError(errno.EEXIST, f"{device} is already on bus {device.bus}", device)
            self._devices[key] = device
        with ExitStack() as undo:
            undo.callback(self._drop_device, device)
            self._publish(device, self.uevent(device))
            undo.pop_all()
        try:
            self.attach(device)
        except MdevError as error:
            log.info("%s", error)

    def _publish(self, device: Device, env: dict[str, str]) -> None:
        above = device.parent
        with device.lock:
            if isinstance(above, Device) and above.state in {State.REMOVING, State.GONE}:
                raise MdevError(errno.ENODEV, f"{device}: its parent {above} is {above.state}", device)
            if isinstance(above, Parent) and (above.leaving or above.gone):
                raise MdevError(errno.ENODEV, f"{device}: its {above} is being unregistered", device)
            if above is not None:
                if device.name in above.children:  # on another bus; one folder of sysfs could not hold both
                    raise MdevError(errno.EEXIST, f"{device}: {above} has a device of that name already", device)
                above.children[device.name] = device
            device.settle(State.UNBOUND)
            self.tell(device, Action.ADD, env)

    def del_device(self, device: Device) -> None:
        """See `Registry.del_device`."""
        device.claim(State.REMOVING)
        with ExitStack() as steps:  # last first, and each whatever becomes of the others
            steps.callback(self._drop_device, device)
            steps.callback(self.retire, device)
            steps.callback(self.del_children, device)
            steps.callback(self.withdraw, device)
            device.depart()
            self.let_go(device, timeout=0.0, force=True)

    def _drop_device(self, device: Device) -> None:
        with self._lock:
            del self._devices[device.bus, device.name]

    def del_children(self, above: Device | Parent) -> None:
        """Take away what is left below a device or parent that goes: whoever added it should have."""
        for child in reversed(list(above.children.values())):
            log.warning("%s is still there while %s goes", child, above)
            quietly(partial(self.del_device, child))

    def retire(self, device: Device) -> None:
        """Make a device that is withdrawn from its driver be gone, and tell."""
        env = self.uevent(device)
        with device.lock:
            if device.parent is not None:
                device.parent.children.pop(device.name, None)
            device.settle(State.GONE)
            self.tell(device, Action.REMOVE, env)

    @property
    def devices(self) -> list[Device]:
        """The devices that are no mdevs, in the order they were added."""
        with self._lock:
            return list(self._devices.values())

    def _named(self, device: Device, name: str) -> DriverHooks:
        broken = None
        if (device.bus, name) not in self.drivers:
            broken = self._load_drivers(device.bus, name)
        try:
            return self.drivers[device.bus, name]
        except KeyError:
            reason = f" ({broken})" if broken else ""
            raise MdevError(errno.ENODEV, f"{device}: there is no driver {name} on bus {device.bus}{reason}", device) from None

    # -- probing -------------------------------------------------------------------------------------------------------

    def probe_any(self, device: Device) -> None:
        """Bind `device` to the first willing candidate; the caller owns the device's state.

        Raises the deferral if any driver asked for one, else the last error; ENODEV when no driver matched.
        """
        with Guard(f"{device}: match failed", device):
            match = device.match
        broken = self._load_drivers(device.bus, match)
        deferral: MdevError | None = None
        failure: MdevError | None = None
        for hooks in self.candidates(device):
            try:
                if not self._suits(device, hooks):
                    continue
                self.probe(device, hooks)
            except MdevError as error:
                if error.errno == EPROBE_DEFER:
                    deferral = deferral or error
                elif failure is None or error.errno not in {errno.ENODEV, errno.ENXIO}:
                    failure = error
            else:
                return
        raise deferral or failure or missing_driver(device, broken)

    def probe(self, device: Device, hooks: DriverHooks) -> None:
        """Let one driver probe a device; undone in reverse order when it fails."""
        if sleeps := self.asleep(device):
            raise ProbeDeferredError(f"{device}: {sleeps}", device)
        device.prober = threading.get_ident()
        try:
            self._really_probe(device, hooks)
        finally:
            device.prober = None

    def _really_probe(self, device: Device, hooks: DriverHooks) -> None:
        bus = self.bus(device.bus)
        with ExitStack() as undo:
            self._take(device, hooks)
            undo.callback(self._drop, device, hooks.driver.name)
            bus.probe(device, hooks.driver)
            undo.callback(quietly, lambda: bus.remove(device))
            device.endpoint = hooks.probe(device)
            device.driver, device.error = hooks.driver.name, None
            undo.pop_all()

    def asleep(self, device: Device) -> str | None:
        """Tell what sleeps of the device and everything above it, None when it may be probed."""
        above: Device | Parent | None = device
        while above is not None:
            if above.suspended or above.suspending:
                return f"{above} is {'suspended' if above.suspended else 'being suspended'}"
            above = above.parent if isinstance(above, Device) else None
        return "the system is suspended" if self.suspended else None

    def put_off(self, device: Device) -> None:
        """Take back the probe of a device that nobody can see yet, as if it had been deferred, if it would run among sleepers.

        A suspend that began during the probe does not know of the device.
        """
        if sleeps := self.asleep(device):
            self.release(device)
            device.error = ProbeDeferredError(f"{device}: {sleeps}", device)

    def _take(self, device: Device, hooks: DriverHooks) -> None:
        """Note that a driver has the device in hand; ENODEV when the driver is leaving."""
        key = device.bus, hooks.driver.name
        with self._lock:
            if self.drivers.get(key) is not hooks or key in self._leaving:
                raise MdevError(errno.ENODEV, f"{device}: driver {hooks.driver.name} is being unregistered", device)
            self._taken[key][device.name] = device

    def _drop(self, device: Device, driver: str) -> None:
        with self._lock:
            del self._taken[device.bus, driver][device.name]
        device.driver = device.endpoint = None
        device.suspended = False

    def release(self, device: Device) -> None:
        """Take a bound device from its driver (__device_release_driver); the caller owns the device's state."""
        name = device.driver
        if name is None:
            return
        hooks, bus = self.drivers[device.bus, name], self.bus(device.bus)
        with ExitStack() as steps:  # last first, and each whatever becomes of the others
            steps.callback(self._drop, device, name)
            steps.callback(quietly, lambda: bus.remove(device))
            steps.callback(quietly, lambda: hooks.remove(device))

    def let_go(self, device: Device, timeout: float, force: bool) -> None:
        """Ask the driver to get its user off the device; EBUSY when the user holds on, never with `force`."""
        if device.driver is None:
            return
        hooks = self.drivers[device.bus, device.driver]
        if force:
            quietly(lambda: hooks.let_go(device, timeout, force))
        else:
            hooks.let_go(device, timeout, force)

    # -- bind and unbind -----------------------------------------------------------------------------------------------

    def attach(self, device: Device) -> None:
        """Find a driver for an unbound device (device_attach); a deferral is no error. EBUSY if it is bound."""
        self._claim_unbound(device)
        self._probe_claimed(device, lambda: self.probe_any(device), State.UNBOUND)

    def bind(self, device: Device, name: str, *, override: bool = False) -> None:
        """Bind a device to the driver `name` (bind in sysfs); with `override`, whatever its id table.

        ENODEV when there is no such driver on the device's bus, or it neither matches nor is the override; EBUSY when bound.
        A bind that fails changes nothing; in particular a deferred device stays deferred.
        """
        hooks = self._named(device, name)
        if not override:
            self._check_match(device, hooks)
        before = self._claim_unbound(device)
        self._probe_claimed(device, lambda: self._probe_by_hand(device, hooks, override), before)

    def _check_match(self, device: Device, hooks: DriverHooks) -> None:
        name, only = hooks.driver.name, device.driver_override
        if only is not None and only != name:
            raise MdevError(errno.ENODEV, f"{device}: driver_override lets only {only} bind it, not {name}", device)
        if only is None and not self.bus(device.bus).match(device, hooks.driver):
            message = f"{device}: driver {name} does not match {device.modalias}; driver_override would make it"
            raise MdevError(errno.ENODEV, message, device)

    def _probe_by_hand(self, device: Device, hooks: DriverHooks, override: bool) -> None:
        """Probe with one driver, made the device's override if so wanted; a failure, not a deferral, takes that back."""
        before = device.driver_override
        if override:
            device.driver_override = hooks.driver.name
        try:
            self.probe(device, hooks)
        except BaseException as error:
            if getattr(error, "errno", None) != EPROBE_DEFER:
                device.driver_override = before
            raise

    def set_override(self, device: Device, name: str | None) -> None:
        """Set or clear driver_override; waits for a probe that is running."""
        with device.lock:
            device.wait_for_rest()
            device.driver_override = name

    def _claim_unbound(self, device: Device) -> State:
        """Claim a device for a probe and return what it was; EBUSY when it is bound."""
        before = device.claim(State.PROBING, {State.UNBOUND, State.DEFERRED})
        if before is State.BOUND:
            raise MdevError(errno.EBUSY, f"{device} is bound to driver {device.driver}", device)
        self._forget(device)
        return before

    def _probe_claimed(self, device: Device, probe: Callable[[], None], otherwise: State) -> None:
        """Probe a claimed device and settle the outcome: bound, deferred (no error), or after a failure `otherwise`."""
        trigger = self._trigger
        try:
            probe()
        except MdevError as error:
            device.error = brief(error)
            deferred = error.errno == EPROBE_DEFER
            self._park(device, State.DEFERRED if deferred else otherwise)
            self.retry_since(trigger, device)
            if not deferred:
                raise
        except BaseException:
            self._park(device, otherwise)
            raise
        else:
            self.announce(device, State.BOUND, Action.BIND)
            self._bound(device)

    def _park(self, device: Device, state: State) -> None:
        if state is State.DEFERRED:
            self.defer(device)
        else:
            device.settle(state)

    def announce(self, device: Device, state: State, action: Action, **more: str) -> None:
        """Settle a state and emit the event that tells of it, in one step; `more` goes into the event."""
        env: dict[str, str] = {}
        try:
            env = self.uevent(device)
        finally:
            if device.driver is not None:
                env["DRIVER"] = device.driver
            with device.lock:
                device.settle(state)
                self.tell(device, action, env | more)

    def tell(self, device: Device, action: Action, env: dict[str, str]) -> None:
        """Emit an event of a device, in its order: what is below a device that is being created comes after that one's ADD.

        If that creation fails, nobody hears of either.
        """
        with device.lock:
            held = device.root.held
            if held is None:
                self._events.emit(action, device.name, env)
            else:
                held.append(partial(self._events.emit, action, device.name, env))

    def uevent(self, device: Device) -> dict[str, str]:
        """Return the event variables of a device; what a broken bus cannot tell is left out."""
        try:
            return self.bus(device.bus).uevent(device)
        except MdevError as error:
            log.error("%s", error)
            return {}

    def unbind(self, device: Device, timeout: float, force: bool = False, driver: str | None = None) -> None:
        """Take a device from its driver, from `driver` only if that is given.

        ENODEV when it is bound to none, or to another; EBUSY when its user holds on for `timeout` seconds.
        """
        if device.claim(State.UNBINDING, {State.BOUND}) is not State.BOUND:
            raise MdevError(errno.ENODEV, f"{device} is bound to no driver", device)
        bound_to = device.driver or ""
        try:
            if driver not in {None, bound_to}:
                raise MdevError(errno.ENODEV, f"{device} is bound to driver {bound_to}, not to {driver}", device)
            self.let_go(device, timeout, force)
        except BaseException:
            device.settle(State.BOUND)
            raise
        try:
            self.release(device)
        finally:
            self.announce(device, State.UNBOUND, Action.UNBIND, DRIVER=bound_to)

    # -- deferred probe ------------------------------------------------------------------------------------------------

    @property
    def trigger(self) -> int:
        """The number of successful binds and resumes so far; read it before a probe and give it to `retry_since`."""
        return self._trigger

    def defer(self, device: Device) -> None:
        """Put a device whose probe was deferred on the pending list; call `retry_since` next, with no lock held."""
        with self._lock:
            self._deferred[device] = None
        device.settle(State.DEFERRED)

    def retry_since(self, trigger: int, device: Device) -> None:
        """After a probe: retry if `device` was bound (others may wait for it), or was deferred across somebody's bind."""
        if device.driver is not None:
            self._bound(device)
        elif self._trigger != trigger:
            self._retry_deferred()

    def withdraw(self, device: Device) -> None:
        """Take a device that goes away from its driver and from the pending list; the caller has claimed it."""
        self._forget(device)
        if device.driver is not None:
            env = {**self.uevent(device), "DRIVER": device.driver}
            try:
                self.release(device)
            finally:
                self.tell(device, Action.UNBIND, env)

    def _bound(self, device: Device) -> None:
        """Note that a device was bound, unless that is part of a probe on this thread that is yet to succeed."""
        here, above = threading.get_ident(), device.parent
        while isinstance(above, Device):
            if above.prober == here:
                return
            above = above.parent
        self.wake()

    def wake(self) -> None:
        """Note a bind or a resume: what waits may find what it waited for. With no lock held."""
        with self._lock:
            self._trigger += 1
            if not self._deferred:
                return
        self._retry_deferred()

    def _retry_deferred(self) -> None:
        """Probe every parked device again until none of them binds. One thread retries; others leave it to that one."""
        with self._lock:
            self._again = True
            if self._retrying:
                return
            self._retrying = True
        try:
            while self._retry_round():
                pass
        except BaseException:
            with self._lock:
                self._retrying = False
            raise

    def _retry_round(self) -> bool:
        """Retry all once; False (and this thread is done) when nothing has happened since the round before."""
        with self._lock:
            if not self._again:
                self._retrying = False
                return False
            self._again = False
            batch = list(self._deferred)
        for device in batch:
            self._retry(device)
        return True

    def _retry(self, device: Device) -> None:
        """Probe a parked device. One that somebody is at work on is left to them: waiting could be for ever."""
        try:
            if device.claim(State.PROBING, {State.DEFERRED}, wait=False) is not State.DEFERRED:
                return
        except MdevError:
            return
        try:
            self.probe_any(device)
        except MdevError as error:
            self._retry_failed(device, error)
        except BaseException:
            device.settle(State.DEFERRED)
            raise
        else:
            self._forget(device)
            self.announce(device, State.BOUND, Action.BIND)
            self._bound(device)

    def _forget(self, device: Device) -> None:
        with self._lock:
            self._deferred.pop(device, None)

    def _retry_failed(self, device: Device, error: MdevError) -> None:
        device.error = brief(error)
        if error.errno == EPROBE_DEFER:
            device.settle(State.DEFERRED)
            return
        self._forget(device)
        log.error("%s", error)
        self.announce(device, State.UNBOUND, Action.CHANGE, ERROR=str(error))
