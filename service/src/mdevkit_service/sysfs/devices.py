"""A device's folder: what its bus and the driver core put there, and its vendor's attributes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError, shown

from mdevkit_service.sysfs import attributes, texts
from mdevkit_service.sysfs.nodes import File, Fixed, Folder, Link, Node, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mdevkit_service.schema import AttributeInfo, Device
    from mdevkit_service.sysfs.tree import System

#: What can be written to ``uevent`` (lib/kobject_uevent.c).
ACTIONS: Final = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")

_OWN: Final = ("driver_override", "iommu_group", "mdev_type", "power", "remove", "subsystem", "uevent")


class DeviceFolder(Folder):
    """``.../PARENT/UUID``. Only called with a device whose parent is there."""

    def __init__(self, system: System, device: Device) -> None:
        self._system: Final = system
        self._device: Final = device

    def child(self, name: str) -> Node | None:
        """See `Folder`: where a vendor's attribute has the name of what every device has, it is the latter."""
        links = {"driver": self._driver, "iommu_group": self._group, "mdev_type": self._type, "subsystem": self._subsystem}
        if name in links:
            return links[name]()
        if name == "remove":
            return File(store=self._remove)
        if name == "driver_override":
            return File(self._override, self._set_override)
        if name == "uevent":
            return uevent(self._variables, lambda action: self._system.announce(self._device, action))
        if name == "power":
            return power()
        return attributes.find(self._infos, self._access, name)

    def names(self) -> Iterable[str]:
        """See `Folder`."""
        driver = ["driver"] if self._device.driver else []
        return dict.fromkeys([*_OWN, *driver, *attributes.names(self._infos)])

    @property
    def _infos(self) -> list[AttributeInfo]:
        parent = self._system.view.parents().get(self._device.parent)
        types = parent.types if parent else []
        return next((type_.device_attributes for type_ in types if type_.id == self._device.type), [])

    def _access(self, name: str, value: str | None) -> str:
        return self._system.view.attribute(self._device.uuid, name, value)

    # -- links -----------------------------------------------------------------------------------------------------

    def _driver(self) -> Link | None:
        return Link(f"/bus/{self._device.bus}/drivers/{self._device.driver}") if self._device.driver else None

    def _group(self) -> Link:
        return Link(f"/kernel/iommu_groups/{self._system.view.group(self._device.uuid)}")

    def _type(self) -> Link:
        folder = (self._system.places.device(self._device) or "").rpartition("/")[0]
        return Link(f"{folder}/mdev_supported_types/{self._device.type}")

    def _subsystem(self) -> Link:
        return Link(f"/bus/{self._system.subsystem(self._device)}")

    # -- files -----------------------------------------------------------------------------------------------------

    def _remove(self, data: bytes) -> None:
        """Remove the device; 0 does nothing, as in Linux."""
        if texts.unsigned(data):
            self._system.view.remove(self._device.uuid)

    def _override(self) -> str:
        return self._system.view.driver_override(self._device.uuid) or "(null)"

    def _set_override(self, data: bytes) -> None:
        if len(data) >= texts.PAGE - 1:
            raise MdevError(errno.EINVAL, "the name of a driver is shorter than a page")
        self._system.view.set_driver_override(self._device.uuid, texts.line(data) or None)

    def _variables(self) -> list[str]:
        known = {"DRIVER": self._device.driver, "MODALIAS": self._device.modalias}
        return [f"{name}={value}" for name, value in known.items() if value]


def uevent(variables: Callable[[], list[str]], announce: Callable[[str], None]) -> File:
    """Return the file that shows a device's event variables, and by which an event can be asked for."""

    def store(data: bytes) -> None:
        # An event's own UUID and variables may follow.
        action = texts.line(data).partition(" ")[0]
        if action not in ACTIONS:
            raise MdevError(errno.EINVAL, f"{shown(action)} is not an action ({', '.join(ACTIONS)})")
        announce(action)

    return File(lambda: "\n".join(variables()), store, bare=True)


def power() -> Folder:
    """Return the folder of runtime power management for a device that has none: it is always on."""

    def control(data: bytes) -> None:
        if texts.line(data) != "on":
            raise MdevError(errno.EINVAL, "this device is always on")

    zero = text("0")
    return Fixed(
        {
            "control": File(lambda: "on", control),
            "runtime_status": text("unsupported"),
            "runtime_active_time": zero,
            "runtime_suspended_time": zero,
        }
    )
