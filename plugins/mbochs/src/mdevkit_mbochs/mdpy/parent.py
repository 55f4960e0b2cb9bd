"""The parent ``mdpy``: four framebuffers of one of three sizes.

Hooks are called on any thread, several creates at once; a parent object has no state of its own beside its pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from mdevkit.attributes import Attribute, Text
from mdevkit.hookspecs import hookimpl
from mdevkit.parent import MdevType, ParentOps, Pool
from mdevkit_vfio.bus import VfioBus, VfioMdev

from mdevkit_mbochs.attributes import COMPAT, DEVICE_API, LINUX, LOOKING, display

if TYPE_CHECKING:
    from mdevkit.device import Mdev

    from mdevkit_mbochs.mdpy.model import MdpyDevice

#: Devices of all types together (the Linux sample's module parameter ``count``).
COUNT: Final = 4
SIZES: Final = {"vga": (640, 480), "xga": (1024, 768), "hd": (1920, 1080)}


def _show_resolution(mdev: Mdev) -> str:
    width, height = SIZES[mdev.type.group]
    return f"{width}x{height}"


_RESOLUTION: Final = Attribute("vendor/resolution", Text(), "Width and height in pixels.", show=_show_resolution)


class MdpyParent(ParentOps):
    """The parent driver; see the README for its types and attributes."""

    name = "mdpy"

    def __init__(self) -> None:
        self._displays: Final = Pool("displays", COUNT)
        self.types = tuple(self._type(group, *size) for group, size in SIZES.items())

    def _type(self, group: str, width: int, height: int) -> MdevType:
        return MdevType(
            group=group,
            bus=VfioBus.name,
            device_api=DEVICE_API,
            name=f"{self.name}-{group}",
            description=f"virtual display, {width}x{height} framebuffer",
            costs={self._displays: 1},
            device_attributes=(COMPAT, _RESOLUTION, *LOOKING),
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Build the card and let onlookers in; errors as `Onlookers.start`."""
        vfio = VfioMdev.from_device(mdev)
        with ExitStack() as undo:
            device = _build(*SIZES[mdev.type.group], params["compat"], f"mdpy {mdev.uuid}")
            undo.callback(device.close)
            device.onlookers.start(mdev, params)
            mdev.drvdata = device
            vfio.set_ops(device)
            undo.pop_all()

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Send the onlookers away: no descriptor, thread or socket file is left."""
        display(mdev).close()


def _build(width: int, height: int, compat: str, name: str) -> MdpyDevice:
    # Imported here: whoever only lists types needs no device model.
    from mdevkit_mbochs.mdpy.model import MdpyDevice, SampleMdpy

    return (SampleMdpy if compat == LINUX else MdpyDevice)(width, height, name=name)
