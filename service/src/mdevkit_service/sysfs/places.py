"""Where parents and devices are in the tree, and what they are called there."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from mdevkit.errors import MdevError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mdevkit_service.schema import Device, Parent
    from mdevkit_service.sysfs.view import View

#: PARENT=ADDRESS[,VENDOR:DEVICE], where PARENT= may be left out for a parent whose name is an address.
_PCI: Final = re.compile(
    r"(?:(?P<parent>.+)=)?(?P<address>(?P<bus>[0-9a-f]{4}:[0-9a-f]{2}):[0-9a-f]{2}\.[0-7])"
    r"(?:,(?P<vendor>[0-9a-f]{4}):(?P<device>[0-9a-f]{4}))?"
)


@dataclass(frozen=True)
class Pci:
    """How a parent looks as a function on a PCI bus. The tools know such parents only (libvirt, and clouds on top of it)."""

    parent: str
    #: DDDD:BB:SS.F; the parent's name in the tree.
    address: str
    #: DDDD:BB.
    bus: str
    #: Of those that QEMU gives to experiments (docs/specs/pci-ids.rst in its sources).
    vendor: int = 0x1AF4
    device: int = 0x10F0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what PARENT=DDDD:BB:SS.F[,VENDOR:DEVICE] asks for; EINVAL."""
        found = _PCI.fullmatch(text)
        if found is None:
            message = (
                f"{shown(text)} is not PARENT=DDDD:BB:SS.F[,VENDOR:DEVICE] in lower-case hex, e.g. mtty=0000:99:00.0,1af4:10f0"
            )
            raise MdevError(errno.EINVAL, message, text)
        parent, address = found["parent"] or found["address"], found["address"]
        if found["vendor"] is None:
            return cls(parent, address, found["bus"])
        return cls(parent, address, found["bus"], int(found["vendor"], 16), int(found["device"], 16))


class Places:
    """Paths. Any thread may call."""

    def __init__(self, view: View, pci: Mapping[str, Pci]) -> None:
        self._view: Final = view
        #: Parent to how it looks on a PCI bus.
        self.pci: Final = pci
        self._named: Final = {looks.address: name for name, looks in pci.items()}

    def name(self, parent: str) -> str:
        """Return what a parent is called in the tree."""
        looks = self.pci.get(parent)
        return looks.address if looks else parent

    def parent(self, name: str) -> Parent | None:
        """Return the parent that is called `name` in the tree."""
        found = self._view.parents().get(self._named.get(name, name))
        return found if found is not None and self.name(found.name) == name else None

    def folder(self, parent: Parent) -> str:
        """Return the path of a parent."""
        looks = self.pci.get(parent.name)
        return f"/devices/pci{looks.bus}/{looks.address}" if looks else f"/devices/virtual/{parent.driver}/{parent.name}"

    def device(self, device: Device) -> str | None:
        """Return the path of a device; None when its parent is not there any more."""
        parent = self._view.parents().get(device.parent)
        return f"{self.folder(parent)}/{device.uuid}" if parent else None
