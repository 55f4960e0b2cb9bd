"""The class bus ``mdev``: mediated devices with the VFIO ops (mdev_vfio of the V12 series).

V12's bus matched every driver with every device; ours compares class ids as the virtio bus does, so that a driver which cannot
serve VFIO is not offered one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mdevkit.bus import Bus
from mdevkit.device import Device, Mdev
from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit_vfio.ops import VfioOps

#: The class id of devices with `VfioOps` on this bus.
VFIO: Final = 1


class VfioMdev(Mdev):
    """A mediated device with VFIO ops."""

    def set_ops(self, ops: VfioOps) -> None:
        """Set class VFIO and the ops (mdev_vfio_set_ops), once, inside create: EBUSY on a second set, EINVAL elsewhere."""
        self._set_class(VFIO, ops)

    def get_ops(self) -> VfioOps:
        """Return the ops; EINVAL as long as none are set."""
        ops: VfioOps = self._get_ops(VFIO)
        return ops

    @classmethod
    def from_device(cls, device: Device) -> VfioMdev:
        """Return `device` as what it is (vfio_mdev_from_dev); ENODEV when it is not on this bus."""
        if not isinstance(device, cls):
            raise MdevError(errno.ENODEV, f"{device} is on bus {device.bus}, not on {VfioBus.name}", device)
        return device


class VfioBus(Bus):
    """The bus."""

    name = "mdev"
    device_class = VfioMdev
