"""Which package brings what is missing. Names only: core depends on none of them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit.device import Device

#: Class bus to the distribution that brings it and its drivers.
BUS_PACKAGES: Final = {
    "mdev": "mdevkit-vfio",
    "mdev_virtio": "mdevkit-virtio",
    "virtio": "mdevkit-virtio",
    "vdev": "mdevkit-vdev",
}
#: Buses whose devices want drivers of their kind: what brings the bus drives some of them only.
_MANY_KINDS: Final = {"virtio"}

#: Distributions with parents, and what they bring.
PARENT_PACKAGES: Final = {
    "mdevkit-mtty": "a PCI serial card (types mtty-1, mtty-2)",
    "mdevkit-mvnet": "a virtio network loopback (types mvnet_loopback-virtio, mvnet_loopback-vhost)",
    "mdevkit-mbochs": "displays (types mbochs-small, -medium, -large; mdpy-vga, -xga, -hd)",
    "mdevkit-ifcvf-sim": "an Intel IFC VF network card (types ifcvf-virtio_mdev, -vhost_mdev, -vfio_pci)",
    "mdevkit-subfunction": "a network card with sub-functions (types subfunction-virtio, -mdev, -mlx5)",
}


def _install(bus: str) -> str:
    package = BUS_PACKAGES.get(bus)
    return f" (pip install {package})" if package else ""


def missing_driver(device: Device, refused: MdevError | None = None) -> MdevError:
    """Return the error for a device no driver matches; `refused` says why an installed one cannot be used."""
    bus = device.bus if device.bus not in _MANY_KINDS else ""
    return _missing(f"{device}: no driver for {device.modalias}", "is installed", bus, device, refused)


def missing_bus(bus: str, wanted_by: object, refused: MdevError | None = None) -> MdevError:
    """Return the error for a class bus that is not there; `refused` says why an installed one cannot be used."""
    return _missing(f"{wanted_by}: class bus {bus}", "is not installed", bus, wanted_by, refused)


def _missing(what: str, state: str, bus: str, subject: object, refused: MdevError | None) -> MdevError:
    if refused is not None and refused.errno == errno.ENOEXEC:
        return MdevError(errno.ENOEXEC, f"{what}: {refused}", subject)
    blocked = f"; {refused}" if refused else ""
    return MdevError(errno.ENODEV, f"{what} {state}{_install(bus)}{blocked}", subject)


def install_parents() -> str:
    """Return how to get a parent, in brackets."""
    return f"(pip install {next(iter(PARENT_PACKAGES))}, for one; `mdevkit types` names others)"


def no_parents() -> str:
    """Return what to say when there is no parent at all."""
    lines = [f"  pip install {name}    {what}" for name, what in PARENT_PACKAGES.items()]
    return "\n".join(["no parent is installed; one of these brings types:", *lines])
