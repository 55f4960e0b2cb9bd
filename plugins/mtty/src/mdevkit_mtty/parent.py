"""The parent ``mtty``: 24 serial ports, given out as cards with one port or two.

Hooks are called on any thread, several creates at once; a parent object has no state of its own beside its pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from mdevkit.hookspecs import hookimpl
from mdevkit.parent import MdevType, ParentOps, Pool
from mdevkit_vfio.bus import VfioBus, VfioMdev

from mdevkit_mtty.attributes import LINUX, PARENT_ATTRIBUTES, device_attributes

if TYPE_CHECKING:
    from mdevkit.device import Mdev

    from mdevkit_mtty.model import SerialDevice

DEVICE_API: Final = "vfio-pci"
#: Ports of all devices together (MAX_MTTYS of the Linux sample).
TOTAL_PORTS: Final = 24


class MttyParent(ParentOps):
    """The parent driver; see the README for its types and attributes."""

    name = "mtty"
    attributes = PARENT_ATTRIBUTES

    def __init__(self) -> None:
        #: The ports both types are made of.
        self.ports: Final = Pool("ports", TOTAL_PORTS)
        self.types = (self._type(1, "Single port serial"), self._type(2, "Dual port serial"))

    def _type(self, ports: int, name: str) -> MdevType:
        return MdevType(
            group=str(ports),
            bus=VfioBus.name,
            device_api=DEVICE_API,
            name=name,
            costs={self.ports: ports},
            device_attributes=device_attributes(ports),
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Build the card and its far ends; errors as `FarEnds.set`, EINVAL for a far end with ``compat=linux``."""
        vfio = VfioMdev.from_device(mdev)
        ports = mdev.type.costs[self.ports]
        with ExitStack() as undo:
            device = _build(ports, params["compat"], mdev)
            undo.callback(device.close)
            for port in range(ports):
                device.set_far_end(port, params[f"port{port}"])
            mdev.drvdata = device
            vfio.set_ops(device)
            undo.pop_all()

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Close the far ends: no descriptor, thread or socket file is left."""
        device: SerialDevice = mdev.drvdata
        device.close()


def _build(ports: int, compat: str, mdev: Mdev) -> SerialDevice:
    # Imported here: whoever only lists types needs no device model.
    from mdevkit_mtty.model import MttyDevice, SampleDevice

    name = f"mtty {mdev.uuid}"
    return SampleDevice(ports, name=name) if compat == LINUX else MttyDevice(ports, name=name, listen=mdev.listen)
