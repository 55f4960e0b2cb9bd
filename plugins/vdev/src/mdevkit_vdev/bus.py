"""The class bus ``vdev``: devices that no class describes, for the vendor's own drivers.

A sub-function of a network card is the card again, only smaller: there are no ops between it and its driver, which knows its
parent and talks to that. What is left for a bus is to bring the two together: by the name of the parent's driver and a name
the vendor gives (auxiliary_bus of Linux, the vendor-neutral bus proposed beside the V12 series).
"""

from __future__ import annotations

import errno
import re
from typing import Any, Final

from mdevkit.bus import Bus
from mdevkit.device import Device, Mdev
from mdevkit.errors import MdevError, shown

#: The class id of every device on this bus; what tells them apart is the match name.
VDEV: Final = 1

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


class VdevMdev(Mdev):
    """A mediated device without ops."""

    def set_match(self, name: str, data: Any = None) -> None:
        """Set the match name, once, inside create; `data` is what the vendor's driver gets to see (`data`).

        EBUSY on a second set, EINVAL elsewhere or for a name that is not made of letters, digits, ``_`` and ``-``.
        """
        if not _NAME.fullmatch(name):
            raise MdevError(errno.EINVAL, f"{self}: the match name {shown(name)} is not made of letters, digits, _ and -", self)
        self._set_class(VDEV, (name, data))

    @property
    def match(self) -> str:
        """``<parent driver>.<name>``; without a name as long as none is set."""
        name = self._get_ops(VDEV)[0] if self.class_id else ""
        return f"{self.parent.driver_name}.{name}"

    @property
    def data(self) -> Any:
        """What the vendor left for its driver; EINVAL before `set_match`."""
        return self._get_ops(VDEV)[1]

    @classmethod
    def from_device(cls, device: Device) -> VdevMdev:
        """Return `device` as what it is; ENODEV when it is not on this bus."""
        if not isinstance(device, cls):
            raise MdevError(errno.ENODEV, f"{device} is on bus {device.bus}, not on {VdevBus.name}", device)
        return device


class VdevBus(Bus):
    """The bus."""

    name = "vdev"
    device_class = VdevMdev
