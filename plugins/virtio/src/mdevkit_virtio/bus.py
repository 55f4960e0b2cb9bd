"""The class bus ``mdev_virtio``: mediated devices with the virtio ops (mdev_virtio of the V12 series); and the ``virtio`` bus.

Two classes share one contract: a device of class VIRTIO is for a virtio driver in this process (``virtio_mdev``), one of class
VHOST for a virtual machine's or DPDK's (``vhost_mdev``). A driver override moves a device from one to the other.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import TYPE_CHECKING

from mdevkit.bus import Bus
from mdevkit.device import Device, Mdev
from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit_virtio.ops import VirtioOps


class ClassId(IntEnum):
    """Class ids of this bus (mdev_set_class of the V12 series)."""

    VIRTIO = 1
    VHOST = 2


class VirtioMdev(Mdev):
    """A mediated device with virtio ops."""

    def set_ops(self, class_id: ClassId, ops: VirtioOps) -> None:
        """Set class and ops (mdev_virtio_set_ops), once, inside create: EBUSY on a second set, EINVAL elsewhere."""
        self._set_class(ClassId(class_id), ops)

    def get_ops(self) -> VirtioOps:
        """Return the ops, whichever of the two classes they were set for; EINVAL as long as none are set."""
        ops: VirtioOps = self._get_ops(self.class_id or ClassId.VIRTIO)
        return ops

    @classmethod
    def from_device(cls, device: Device) -> VirtioMdev:
        """Return `device` as what it is (virtio_mdev_from_dev); ENODEV when it is not on this bus."""
        if not isinstance(device, cls):
            raise MdevError(errno.ENODEV, f"{device} is on bus {device.bus}, not on {VirtioMdevBus.name}", device)
        return device


class VirtioMdevBus(Bus):
    """The class bus."""

    name = "mdev_virtio"
    device_class = VirtioMdev
