"""``bus/``: the devices and drivers of each class bus, and drivers by hand.

Tools look for mediated devices on the bus ``mdev`` and know no other, so all of them are listed there, and on their own bus too.
Drivers are on their own bus only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

from mdevkit_service.sysfs import texts
from mdevkit_service.sysfs.devices import uevent
from mdevkit_service.sysfs.nodes import File, Fixed, Folder, Link, Listing, Node

if TYPE_CHECKING:
    from mdevkit_service.schema import Device
    from mdevkit_service.sysfs.tree import System


class BusesFolder(Folder):
    """``bus``."""

    def __init__(self, system: System) -> None:
        self._system: Final = system

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        if name == "pci" and self._system.places.pci:
            return _pci_bus(self._system)
        return BusFolder(self._system, name) if name in self._system.buses() else None

    def names(self) -> list[str]:
        """See `Folder`."""
        return [*self._system.buses(), *(["pci"] if self._system.places.pci else [])]


class BusFolder(Folder):
    """``bus/BUS``."""

    def __init__(self, system: System, bus: str) -> None:
        self._system: Final = system
        self._bus: Final = bus

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        match name:
            case "devices":
                return Listing(self._device, self._devices)
            case "drivers":
                return Listing(self._driver, self._drivers)
            case "drivers_autoprobe":
                return File(lambda: "0" if self._bus in self._system.unprobed else "1", self._set_autoprobe)
            case "drivers_probe":
                return File(store=self._probe)
            case "uevent":
                return File(store=_nothing_to_tell)
        return None

    def names(self) -> tuple[str, ...]:
        """See `Folder`."""
        return ("devices", "drivers", "drivers_autoprobe", "drivers_probe", "uevent")

    # -- devices ---------------------------------------------------------------------------------------------------

    def _holds(self, device: Device) -> bool:
        return self._bus in {"mdev", device.bus}

    def _device(self, name: str) -> Node | None:
        device = self._system.device(name)
        path = self._system.places.device(device) if device and self._holds(device) else None
        return Link(path) if path else None

    def _devices(self) -> Iterable[str]:
        return (device.uuid for device in self._system.devices() if self._holds(device))

    def _named(self, data: bytes) -> Device:
        """Return the device whose name is written; ENODEV when there is none on this bus."""
        name = texts.line(data)
        device = self._system.device(name)
        if device is None or not self._holds(device):
            raise MdevError(errno.ENODEV, f"there is no device {name!r} on bus {self._bus}")
        return device

    # -- drivers ---------------------------------------------------------------------------------------------------

    def _driver(self, name: str) -> Node | None:
        if not self._system.view.has_driver(self._bus, name):
            return None
        own: dict[str, Node] = {
            "bind": File(store=partial(self._bind, name)),
            "unbind": File(store=partial(self._unbind, name)),
            "uevent": File(store=_nothing_to_tell),
        }
        return Listing(lambda child: own.get(child) or self._bound(name, child), lambda: [*own, *self._bound_to(name)])

    def _drivers(self) -> Iterable[str]:
        return (driver.name for driver in self._system.view.drivers() if driver.bus == self._bus)

    def _bound(self, driver: str, name: str) -> Node | None:
        device = self._system.device(name)
        if device is None or (device.bus, device.driver) != (self._bus, driver):
            return None
        path = self._system.places.device(device)
        return Link(path) if path else None

    def _bound_to(self, driver: str) -> list[str]:
        return [device.uuid for device in self._system.devices() if (device.bus, device.driver) == (self._bus, driver)]

    def _bind(self, driver: str, data: bytes) -> None:
        self._system.view.bind(self._named(data).uuid, driver)

    def _unbind(self, driver: str, data: bytes) -> None:
        """Unbind a device from this driver: one that another has is none of its business."""
        device = self._named(data)
        if device.driver != driver:
            raise MdevError(errno.ENODEV, f"device {device.uuid} is not bound to driver {driver}")
        self._system.view.unbind(device.uuid)

    def _probe(self, data: bytes) -> None:
        """Find a driver for a device; one that has a driver is left as it is, without an error."""
        device = self._named(data)
        if device.driver is None:
            self._system.view.bind(device.uuid, None)

    def _set_autoprobe(self, data: bytes) -> None:
        if texts.flag(data):
            self._system.unprobed.discard(self._bus)
        else:
            self._system.unprobed.add(self._bus)


def _nothing_to_tell(data: bytes) -> None:
    """Take an action for a bus or a driver, of which nobody is told."""
    uevent(list, lambda _action: None).write(data)


def _pci_bus(system: System) -> Folder:
    """Return ``bus/pci``: parents that look like PCI functions, and their drivers, which cannot be exchanged."""
    places = system.places

    def device(address: str) -> Node | None:
        parent = places.parent(address)
        return Link(places.folder(parent)) if parent and parent.name in places.pci else None

    def present() -> list[str]:
        return [looks.address for looks in places.pci.values() if places.parent(looks.address)]

    def driver(name: str) -> Node | None:
        own = {address: device(address) for address in present() if _driver_of(system, address) == name}
        return Fixed({address: node for address, node in own.items() if node}) if own else None

    return Fixed(
        {
            "devices": Listing(device, present),
            "drivers": Listing(driver, lambda: list(dict.fromkeys(_driver_of(system, address) for address in present()))),
        }
    )


def _driver_of(system: System, address: str) -> str:
    parent = system.places.parent(address)
    return parent.driver if parent else ""
