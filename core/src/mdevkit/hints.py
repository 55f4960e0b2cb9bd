"""Which package brings what is missing. Names only: core depends on none of them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit.device import Device

#: Class bus to the distribution that brings it and its drivers.
BUS_PACKAGES: Final = {"mdev": "mdevkit-vfio"}

#: Distributions with parents, and what they bring.
PARENT_PACKAGES: Final = {"mdevkit-mtty": "a PCI serial card (types mtty-1, mtty-2)"}


def _install(bus: str) -> str:
    package = BUS_PACKAGES.get(bus)
    return f" (pip install {package})" if package else ""


def missing_driver(device: Device) -> MdevError:
    """Return the error for a device no driver matches."""
    message = f"{device}: no driver for {device.modalias} is installed{_install(device.bus)}"
    return MdevError(errno.ENODEV, message, device)


def missing_bus(bus: str, wanted_by: object) -> MdevError:
    """Return the error for a class bus that is not there."""
    return MdevError(errno.ENODEV, f"{wanted_by}: class bus {bus} is not installed{_install(bus)}", wanted_by)


def no_parents() -> str:
    """Return what to say when there is no parent at all."""
    lines = [f"  pip install {name}    {what}" for name, what in PARENT_PACKAGES.items()]
    return "\n".join(["no parent is installed; one of these brings types:", *lines])
