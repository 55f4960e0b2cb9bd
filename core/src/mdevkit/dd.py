"""Driver binding (drivers/base/dd.c): which driver gets a device, deferred probe, bind and unbind.

`DriverCore` holds the buses and drivers of one registry. It changes a device's state only through `Device.claim` and
`Device.settle`, so no lock is held while a driver runs, and any thread may call. Probing order: the override alone if one is
set, else every matching driver by name; the first whose probe succeeds wins. A probe that asks to be deferred parks the device
until another bind succeeds anywhere in the registry; the thread that bound retries the parked ones.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from mdevkit.device import Device, State
from mdevkit.dispatch import BusHooks, DriverHooks
from mdevkit.errors import EPROBE_DEFER, MdevError, ProbeDeferredError
from mdevkit.events import Action, EventLog
from mdevkit.hints import missing_driver

if TYPE_CHECKING:
    from mdevkit.bus import Bus
    from mdevkit.driver import Driver

log = logging.getLogger(__name__)

#: Loads what is installed for a bus and a match (or a driver's name), and returns the error of a plugin that failed.
LoadDrivers = Callable[[str, str], MdevError | None]


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
        self._bound: Final[dict[tuple[str, str], dict[str, Device]]] = {}
        self._devices: Final[dict[tuple[str, str], Device]] = {}
        self._lock: Final = threading.Lock()
        self._deferred: Final[dict[Device, None]] = {}
        #: Counts successful binds: a probe that was deferred across one is tried again at once.
        self._trigger = 0
        self._retrying = False
        self._again = False

    # -- buses and drivers ---------------------------------------------------------------------------------------------

    def add_bus(self, bus: Bus) -> None:
        """Register a class bus: EEXIST for a name that is taken, EINVAL for a plugin that breaks the contract."""
        hooks = BusHooks(bus, self._wrappers)
        with self._lock:
            if not bus.name:
                raise MdevError(errno.EINVAL, f"bus {type(bus).__qualname__} has no name", bus)
            if bus.name in self.buses:
                raise MdevError(errno.EEXIST, f"bus {bus.name} is already registered", bus)
            self.buses[bus.name] = hooks

    def add_driver(self, driver: Driver) -> None:
        """Register a driver: EEXIST, EINVAL as for a bus. Devices are bound to it when they ask, not here."""
        hooks = DriverHooks(driver, self._wrappers)
        if not driver.name or not driver.bus:
            raise MdevError(errno.EINVAL, f"driver {type(driver).__qualname__} has no name or no bus", driver)
        with self._lock:
            if (driver.bus, driver.name) in self.drivers:
                raise MdevError(errno.EEXIST, f"driver {driver.name} is already registered on bus {driver.bus}", driver)
            self.drivers[driver.bus, driver.name] = hooks
            self._bound[driver.bus, driver.name] = {}

    def remove_driver(self, bus: str, name: str) -> None:
        """Unbind every device of a driver, by force, then forget it; ENODEV if there is none, EAGAIN if one is being created."""
        with self._lock:
            if (bus, name) not in self.drivers:
                raise MdevError(errno.ENODEV, f"there is no driver {name} on bus {bus}")
        while devices := self._drop_if_idle(bus, name):
            for device in devices:
                self.unbind(device, timeout=0.0, force=True)

    def _drop_if_idle(self, bus: str, name: str) -> list[Device]:
        """Forget a driver that has bound nothing, else return what it has bound."""
        with self._lock:
            devices = list(self._bound.get((bus, name), {}).values())
            if not devices:
                self.drivers.pop((bus, name), None)
                self._bound.pop((bus, name), None)
            return devices

    def bound_to(self, bus: str, name: str) -> list[Device]:
        """Return the devices a driver has bound."""
        with self._lock:
            return list(self._bound.get((bus, name), {}).values())

    def bus(self, name: str) -> BusHooks:
        """Return a bus; ENODEV when it is not there."""
        try:
            return self.buses[name]
        except KeyError:
            raise MdevError(errno.ENODEV, f"there is no bus {name}") from None

    # -- matching ------------------------------------------------------------------------------------------------------

    def candidates(self, device: Device) -> Iterator[DriverHooks]:
        """Yield the drivers to try: the override alone, or those that match, by name."""
        if device.driver_override is not None:
            yield self._named(device, device.driver_override)
            return
        bus = self.bus(device.bus)
        with self._lock:
            here = sorted(name for on, name in self.drivers if on == device.bus)
        for name in here:
            hooks = self.drivers.get((device.bus, name))
            if hooks is not None and bus.match(device, hooks.driver):
                yield hooks

    # -- devices that are no mdevs -------------------------------------------------------------------------------------

    def add_device(self, device: Device) -> None:
        """See `Registry.add_device`."""
        with self._lock:
            if self._devices.setdefault((device.bus, device.name), device) is not device:
                raise MdevError(errno.EEXIST, f"{device} is already on bus {device.bus}", device)
        env = self.uevent(device)
        with device.lock:
            if isinstance(device.parent, Device):
                device.parent.children[device.name] = device
            device.settle(State.UNBOUND)
            self._events.emit(Action.ADD, device.name, env)
        try:
            self.attach(device)
        except MdevError as error:
            log.info("%s", error)

    def del_device(self, device: Device) -> None:
        """See `Registry.del_device`."""
        device.claim(State.REMOVING)
        self.let_go(device, timeout=0.0, force=True)
        env = self.uevent(device)
        self.withdraw(device)
        with device.lock:
            if isinstance(device.parent, Device):
                device.parent.children.pop(device.name, None)
            device.settle(State.GONE)
            self._events.emit(Action.REMOVE, device.name, env)
        with self._lock:
            del self._devices[device.bus, device.name]

    def _named(self, device: Device, name: str) -> DriverHooks:
        broken = None
        if (device.bus, name) not in self.drivers:
            broken = self._load_drivers(device.bus, name)
        try:
            return self.drivers[device.bus, name]
        except KeyError:
            message = f"{device}: there is no driver {name} on bus {device.bus}"
            raise broken or MdevError(errno.ENODEV, message, device) from None

    # -- probing -------------------------------------------------------------------------------------------------------

    def probe_any(self, device: Device) -> None:
        """Bind `device` to the first willing candidate; the caller owns the device's state.

        Raises the deferral if any driver asked for one, else the last error; ENODEV when no driver matched.
        """
        broken = self._load_drivers(device.bus, device.match)
        deferral: MdevError | None = None
        failure: MdevError | None = None
        for hooks in self.candidates(device):
            try:
                self.probe(device, hooks)
            except MdevError as error:
                if error.errno == EPROBE_DEFER:
                    deferral = deferral or error
                elif failure is None or error.errno not in {errno.ENODEV, errno.ENXIO}:
                    failure = error
            else:
                return
        raise deferral or failure or broken or missing_driver(device)

    def probe(self, device: Device, hooks: DriverHooks) -> None:
        """Let one driver probe a device (really_probe); undone in reverse order when it fails."""
        if self.suspended:
            raise ProbeDeferredError(f"{device}: the system is suspended", device)
        bus = self.bus(device.bus)
        bus.probe(device, hooks.driver)
        try:
            endpoint = hooks.probe(device)
        except MdevError as error:
            device.error = error
            self._quietly(lambda: bus.remove(device))
            raise
        device.driver, device.endpoint, device.error = hooks.driver.name, endpoint, None
        with self._lock:
            self._bound.setdefault((device.bus, hooks.driver.name), {})[device.name] = device

    def release(self, device: Device) -> None:
        """Take a bound device from its driver (__device_release_driver); the caller owns the device's state."""
        name = device.driver
        if name is None:
            return
        hooks = self.drivers[device.bus, name]
        self._quietly(lambda: hooks.remove(device))
        self._quietly(lambda: self.bus(device.bus).remove(device))
        with self._lock:
            self._bound.get((device.bus, name), {}).pop(device.name, None)
        device.driver = device.endpoint = None
        device.suspended = False

    def let_go(self, device: Device, timeout: float, force: bool) -> None:
        """Ask the driver to get its user off the device; EBUSY when the user holds on, never with `force`."""
        if device.driver is None:
            return
        hooks = self.drivers[device.bus, device.driver]
        if force:
            self._quietly(lambda: hooks.let_go(device, timeout, force))
        else:
            hooks.let_go(device, timeout, force)

    @staticmethod
    def _quietly(call: Callable[[], None]) -> None:
        """Make a call whose failure cannot stop what is under way; it is logged."""
        try:
            call()
        except MdevError as error:
            log.error("%s", error)

    # -- bind and unbind -----------------------------------------------------------------------------------------------

    def attach(self, device: Device) -> None:
        """Find a driver for an unbound device (device_attach); a deferral is no error. EBUSY if it is bound."""
        self._claim_unbound(device)
        self._finish_probe(device, lambda: self.probe_any(device))

    def bind(self, device: Device, name: str) -> None:
        """Bind a device to the driver `name` (bind in sysfs).

        ENODEV when there is no such driver on the device's bus, or it neither matches nor is the override; EBUSY when bound.
        """
        hooks = self._named(device, name)
        override = device.driver_override
        matches = override == name if override else self.bus(device.bus).match(device, hooks.driver)
        if not matches:
            raise MdevError(
                errno.ENODEV,
                f"{device}: driver {name} does not match {device.modalias}; driver_override would make it",
                device,
            )
        self._claim_unbound(device)
        self._finish_probe(device, lambda: self.probe(device, hooks))

    def _claim_unbound(self, device: Device) -> None:
        before = device.claim(State.PROBING)
        if before is State.BOUND:
            device.settle(before)
            raise MdevError(errno.EBUSY, f"{device} is bound to driver {device.driver}", device)
        self._forget(device)

    def _finish_probe(self, device: Device, probe: Callable[[], None]) -> None:
        trigger = self._trigger
        try:
            probe()
        except MdevError as error:
            if error.errno == EPROBE_DEFER:
                self.defer(device)
                self.retry_since(trigger, device)
                return
            device.settle(State.UNBOUND)
            raise
        self.announce(device, State.BOUND, Action.BIND)
        self.bind_succeeded()

    def announce(self, device: Device, state: State, action: Action) -> None:
        """Settle a state and emit the event that tells of it, in one step."""
        env = self.uevent(device)
        if device.driver is not None:
            env["DRIVER"] = device.driver
        with device.lock:
            device.settle(state)
            self._events.emit(action, device.name, env)

    def uevent(self, device: Device) -> dict[str, str]:
        """Return the event variables of a device; what a broken bus cannot tell is left out."""
        try:
            return self.bus(device.bus).uevent(device)
        except MdevError as error:
            log.error("%s", error)
            return {"MODALIAS": device.modalias}

    def unbind(self, device: Device, timeout: float, force: bool = False) -> None:
        """Take a device from its driver: ENODEV when it has none, EBUSY when its user holds on for `timeout` seconds."""
        before = device.claim(State.UNBINDING)
        if before is not State.BOUND:
            device.settle(before)
            raise MdevError(errno.ENODEV, f"{device} is bound to no driver", device)
        try:
            self.let_go(device, timeout, force)
        except MdevError:
            device.settle(before)
            raise
        driver = device.driver or ""
        self.release(device)
        with device.lock:
            device.settle(State.UNBOUND)
            self._events.emit(Action.UNBIND, device.name, {**self.uevent(device), "DRIVER": driver})

    # -- deferred probe ------------------------------------------------------------------------------------------------

    @property
    def trigger(self) -> int:
        """The number of successful binds so far; read it before a probe and give it to `retry_since`."""
        return self._trigger

    def defer(self, device: Device) -> None:
        """Put a device whose probe was deferred on the pending list; call `retry_since` next, with no lock held."""
        with self._lock:
            self._deferred[device] = None
        device.settle(State.DEFERRED)

    def retry_since(self, trigger: int, device: Device) -> None:
        """After a probe: retry if `device` was bound (others may wait for it), or was deferred across somebody's bind."""
        if device.driver is not None:
            self.bind_succeeded()
        elif self._trigger != trigger:
            self.retry_deferred()

    def withdraw(self, device: Device) -> None:
        """Take a device that goes away from its driver and from the pending list; the caller has claimed it."""
        self._forget(device)
        if device.driver is not None:
            env = {**self.uevent(device), "DRIVER": device.driver}
            self.release(device)
            self._events.emit(Action.UNBIND, device.name, env)

    def bind_succeeded(self) -> None:
        """Note that a device was bound: what waits may find what it waited for."""
        with self._lock:
            self._trigger += 1
            if not self._deferred:
                return
        self.retry_deferred()

    def retry_deferred(self) -> None:
        """Probe every parked device again until none of them binds. One thread retries; others leave it to that one."""
        with self._lock:
            self._again = True
            if self._retrying:
                return
            self._retrying = True
        while self._retry_round():
            pass

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
        try:
            before = device.claim(State.PROBING)
        except MdevError:
            return
        if before is not State.DEFERRED:
            device.settle(before)
            return
        try:
            self.probe_any(device)
        except MdevError as error:
            self._retry_failed(device, error)
        else:
            self._forget(device)
            self.announce(device, State.BOUND, Action.BIND)
            self.bind_succeeded()

    def _forget(self, device: Device) -> None:
        with self._lock:
            self._deferred.pop(device, None)

    def _retry_failed(self, device: Device, error: MdevError) -> None:
        if error.errno == EPROBE_DEFER:
            device.settle(State.DEFERRED)
            return
        self._forget(device)
        log.error("%s", error)
        with device.lock:
            device.settle(State.UNBOUND)
            self._events.emit(Action.CHANGE, device.name, {**self.uevent(device), "ERROR": str(error)})
