"""The parent ``0000:06:00.0``: a simulated network card that divides into sub-functions of three flavours.

Each flavour lands on the bus of its kind: ``virtio`` on `mdev_virtio`, ``mdev`` on `mdev`, ``mlx5`` on `vdev`. Hooks are called on
any thread, several creates at once; what they share is the eswitch, which has a lock of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.parent import MdevType, ParentOps, Pool
from mdevkit_vdev.bus import VdevMdev
from mdevkit_vfio.bus import VfioMdev
from mdevkit_virtio.bus import ClassId, VirtioMdev

from mdevkit_subfunction import words
from mdevkit_subfunction.attributes import DEVICE_ATTRIBUTES, PARENT_ATTRIBUTES, type_attributes
from mdevkit_subfunction.eswitch import Eswitch, Port

if TYPE_CHECKING:
    from mdevkit.device import Mdev

#: Sub-functions the card can have.
MAX_MDEVS: Final = 64
#: The name vdev drivers match: "subfunction.sf".
MATCH: Final = "sf"

#: Flavour to bus, device API and what `mdevkit types` says.
_KINDS: Final = {
    "virtio": ("mdev_virtio", "virtio_mdev", "Sub-function with virtio ops"),
    "mdev": ("mdev", "vfio-pci", "Sub-function for a guest, as a PCI device"),
    "mlx5": ("vdev", "vdev", "Sub-function for the vendor's driver, as a netdev"),
}


class SubfunctionParent(ParentOps):
    """The parent driver; see the README for types, attributes and the commands around them."""

    name = "0000:06:00.0"
    driver_name = "subfunction"
    attributes = PARENT_ATTRIBUTES

    def __init__(self) -> None:
        self.slots: Final = Pool("sub-functions", MAX_MDEVS)
        self.eswitch: Final = Eswitch(self.name, self.slots)
        self.types = tuple(self._type(flavour) for flavour in _KINDS)

    def _type(self, flavour: str) -> MdevType:
        bus, device_api, name = _KINDS[flavour]
        return MdevType(
            group=flavour,
            bus=bus,
            device_api=device_api,
            name=name,
            costs={self.slots: 1},
            attributes=type_attributes(),
            device_attributes=DEVICE_ATTRIBUTES,
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Activate the device's port, or make one: errors as `Eswitch.activate`; ENODEV if the port is deleted meanwhile."""
        hw_addr = words.address(params["hw_addr"]) if params["hw_addr"] else None
        port = self.eswitch.activate(mdev.type.group, mdev, hw_addr, params["sfnum"], params["representor"] or None)
        try:
            # An active port cannot be deleted; one that was, before that, has taken the device's slot with it.
            if str(mdev.uuid) not in self.slots.holders:
                raise MdevError(errno.ENODEV, f"the port of {mdev} was deleted while it was created", mdev)
            _BUILD[mdev.type.group](self.eswitch, port, mdev)
        except BaseException:
            self.eswitch.deactivate(port)
            raise
        mdev.drvdata = port

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Deactivate the port; one that came with the device goes with it."""
        port: Port = mdev.drvdata
        self.eswitch.deactivate(port)
        if mdev.type.group == "virtio":
            _close_virtio(mdev)


def _build_virtio(eswitch: Eswitch, port: Port, mdev: Mdev) -> None:
    # Here and below: whoever only lists types needs no device model.
    from mdevkit_subfunction.net import SubfunctionNet

    port.function = device = SubfunctionNet(eswitch, port, f"subfunction {mdev.uuid}")
    VirtioMdev.from_device(mdev).set_ops(ClassId.VIRTIO, device)


def _build_mdev(eswitch: Eswitch, port: Port, mdev: Mdev) -> None:
    from mdevkit_subfunction.model import SubfunctionDevice

    port.function = device = SubfunctionDevice(eswitch, port, f"subfunction {mdev.uuid}")
    VfioMdev.from_device(mdev).set_ops(device)


def _build_mlx5(eswitch: Eswitch, port: Port, mdev: Mdev) -> None:
    VdevMdev.from_device(mdev).set_match(MATCH, data=(eswitch, port))


def _close_virtio(mdev: Mdev) -> None:
    from mdevkit_subfunction.net import SubfunctionNet

    device = VirtioMdev.from_device(mdev).get_ops()
    assert isinstance(device, SubfunctionNet)
    device.close()


_BUILD: Final[Mapping[str, Callable[[Eswitch, Port, Mdev], None]]] = {
    "virtio": _build_virtio,
    "mdev": _build_mdev,
    "mlx5": _build_mlx5,
}
