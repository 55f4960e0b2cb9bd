"""The parent ``mbochs``: 256 MB of video memory, given out as displays with 4, 16 or 64 MB.

Hooks are called on any thread, several creates at once; a parent object has no state of its own beside its pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mdevkit.hookspecs import hookimpl
from mdevkit.parent import MdevType, ParentOps, Pool
from mdevkit_vfio.bus import VfioBus, VfioMdev

from mdevkit_mbochs.attributes import DEVICE_API, LINUX, display
from mdevkit_mbochs.mbochs.attributes import device_attributes, plug_in

if TYPE_CHECKING:
    from mdevkit.device import Mdev

    from mdevkit_mbochs.mbochs.model import MbochsDevice

MEGABYTE: Final = 1 << 20
#: Megabytes of all devices together (the Linux sample's module parameter ``count``).
BUDGET: Final = 256


@dataclass(frozen=True)
class Size:
    """A type: megabytes, the most pixels a side that its EDID tells (0: no limit), and the resolution of its monitor."""

    megabytes: int
    limit: tuple[int, int]
    resolution: tuple[int, int]


SIZES: Final = {
    "small": Size(4, (800, 600), (800, 600)),
    "medium": Size(16, (1920, 1440), (1024, 768)),
    "large": Size(64, (0, 0), (1920, 1080)),
}


class MbochsParent(ParentOps):
    """The parent driver; see the README for its types and attributes."""

    name = "mbochs"

    def __init__(self) -> None:
        self._memory: Final = Pool("megabytes", BUDGET)
        self.types = tuple(self._type(group, size) for group, size in SIZES.items())

    def _type(self, group: str, size: Size) -> MdevType:
        return MdevType(
            group=group,
            bus=VfioBus.name,
            device_api=DEVICE_API,
            name=f"{self.name}-{group}",
            description=f"virtual display, {size.megabytes} MB video memory",
            costs={self._memory: size.megabytes},
            device_attributes=device_attributes(size.megabytes, size.limit, size.resolution),
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Build the card, plug the monitor in and let onlookers in; errors as `Onlookers.start`."""
        vfio = VfioMdev.from_device(mdev)
        with ExitStack() as undo:
            device = _build(SIZES[mdev.type.group], params["compat"], f"mbochs {mdev.uuid}")
            undo.callback(device.close)
            plug_in(device, params)
            device.onlookers.start(mdev, params)
            mdev.drvdata = device
            vfio.set_ops(device)
            undo.pop_all()

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Send the onlookers away: no descriptor, thread or socket file is left."""
        display(mdev).close()


def _build(size: Size, compat: str, name: str) -> MbochsDevice:
    # Imported here: whoever only lists types needs no device model.
    from mdevkit_mbochs.mbochs.model import MbochsDevice, SampleMbochs

    return (SampleMbochs if compat == LINUX else MbochsDevice)(size.megabytes * MEGABYTE, size.limit, name=name)
