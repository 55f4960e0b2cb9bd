"""A parent for tests: PCI functions whose host a client's write can kill.

``fragile-1`` can go on in another process, ``fragile-2`` cannot, so that it is served without a front.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from mdevkit import MdevType, ParentOps, Pool, hookimpl
from mdevkit.device import Mdev
from mdevkit_vfio.bus import VfioBus, VfioMdev
from mdevkit_vfio.pci import Bar, PciDevice, PciIds

#: Registers of BAR 0: any value; whatever is written here kills the process.
VALUE, DIE = 0, 4


class Fragile(PciDevice):
    """The device."""

    def __init__(self, name: str, survives: bool) -> None:
        self.value, self.survives = 0, survives
        super().__init__(PciIds(0x1234, 1), {0: Bar(4096)}, name=name)

    def device_reset(self) -> None:
        """See `PciDevice`."""
        self.value = 0

    def device_checkpoint(self) -> bytes | None:
        """See `PciDevice`."""
        return self.value.to_bytes(4, "little") if self.survives else None

    def device_restore(self, state: bytes) -> None:
        """See `PciDevice`."""
        self.value = int.from_bytes(state, "little")

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice`."""
        del bar, size
        return self.value if offset == VALUE else 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice`."""
        del bar, size
        if offset == VALUE:
            self.value = value
        elif offset == DIE:
            os.kill(os.getpid(), signal.SIGKILL)


class FragileParent(ParentOps):
    """The parent."""

    name = "fragile"

    def __init__(self) -> None:
        slots = Pool("slots", 8)
        kinds = {"1": "Survives", "2": "Does not survive"}
        self.types = tuple(
            MdevType(group=group, bus=VfioBus.name, device_api="vfio-pci", name=name, costs={slots: 1})
            for group, name in kinds.items()
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Make a device."""
        del params
        VfioMdev.from_device(mdev).set_ops(Fragile(mdev.name, mdev.type.id == "fragile-1"))

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Nothing to give back."""


def make() -> FragileParent:
    """Return the parent, for the entry point."""
    return FragileParent()
