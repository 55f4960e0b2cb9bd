"""The parent ``mvnet_loopback``: network cards whose cable leads back into them, as many as you like.

Hooks are called on any thread, several creates at once; a parent object has no state of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from mdevkit.hookspecs import hookimpl
from mdevkit.parent import MdevType, ParentOps
from mdevkit_virtio.bus import ClassId, VirtioMdev, VirtioMdevBus

from mdevkit_mvnet.attributes import MAX_PAIRS, PARENT_ATTRIBUTES, device_attributes
from mdevkit_mvnet.regs import FEATURES, OFFLOADS

if TYPE_CHECKING:
    from mdevkit.device import Mdev

    from mdevkit_mvnet.model import MvnetDevice

#: Class by type.
_CLASSES: Final = {"virtio": ClassId.VIRTIO, "vhost": ClassId.VHOST}
#: The rings' largest size: Linux's sample's, and what QEMU asks a vhost-user backend for at most.
_QUEUE_SIZES: Final = {"virtio": 256, "vhost": 1024}


class MvnetParent(ParentOps):
    """The parent driver; see the README for its types and attributes."""

    name = "mvnet_loopback"
    attributes = PARENT_ATTRIBUTES

    def __init__(self) -> None:
        self.types = tuple(self._type(group) for group in _CLASSES)

    @staticmethod
    def _type(group: str) -> MdevType:
        # A driver of this process would need a control queue for several pairs; a vhost frontend has its own.
        pairs = MAX_PAIRS if group == "vhost" else 1
        return MdevType(
            group=group,
            bus=VirtioMdevBus.name,
            device_api=f"{group}_mdev",
            name="virtio-net" if group == "virtio" else "vhost-net",
            description="Network card that receives what it sends",
            device_attributes=device_attributes(_QUEUE_SIZES[group], pairs, int(FEATURES), int(FEATURES & ~OFFLOADS)),
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Build the card."""
        # Imported here: whoever only lists types needs no device model.
        from mdevkit_mvnet.model import make_device

        virtio = VirtioMdev.from_device(mdev)
        with ExitStack() as undo:
            device = make_device(mdev.uuid, params)
            undo.callback(device.close)
            mdev.drvdata = device
            virtio.set_ops(_CLASSES[mdev.type.group], device)
            undo.pop_all()

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """End the card's threads and close its descriptors."""
        device: MvnetDevice = mdev.drvdata
        device.close()
