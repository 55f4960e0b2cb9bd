"""Class buses: one per API contract between vendors and drivers.

A bus plugin subclasses `Bus`, names itself and brings the device class that carries its typed setter and getter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mdevkit.device import Device, Mdev
from mdevkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from mdevkit.driver import Driver


class Bus:
    """Base of a class bus. Hooks: `mdevkit.hookspecs.BusSpec`; an override must be marked with ``@hookimpl`` too."""

    #: Unique over the registry, e.g. ``mdev``.
    name: ClassVar[str] = ""
    #: Class of the mediated devices on this bus.
    device_class: ClassVar[type[Mdev]] = Mdev

    @hookimpl
    def bus_match(self, device: Device, driver: Driver) -> bool:
        """See `BusSpec.bus_match`: an exact entry of the id table."""
        return device.match in driver.id_table

    @hookimpl
    def bus_uevent(self, device: Device) -> dict[str, str]:
        """See `BusSpec.bus_uevent`."""
        return device.uevent()
