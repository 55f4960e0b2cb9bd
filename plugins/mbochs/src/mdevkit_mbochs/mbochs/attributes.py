"""What a user can see and set of an mbochs: its memory, and the monitor that is plugged in.

Loaded to list types, so it is small. `show` and `store` run on any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mdevkit.attributes import Attribute, Int, Kind, Text
from mdevkit.errors import shown

from mdevkit_mbochs import edid
from mdevkit_mbochs.attributes import AUTO, COMPAT, LOOKING, OFF

if TYPE_CHECKING:
    from mdevkit.device import Mdev

    from mdevkit_mbochs.mbochs.model import MbochsDevice

_MEGABYTE: Final = 1 << 20


@dataclass(frozen=True)
class Resolution(Kind[tuple[int, int]]):
    """``WIDTHxHEIGHT`` in pixels: at most `limit` (0: no limit) and what fits `memory` bytes."""

    limit: tuple[int, int]
    memory: int

    def parse(self, text: str) -> tuple[int, int]:
        """See `Kind.parse`."""
        width, x, height = text.partition("x")
        if not (x and width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(text) < 12):
            raise ValueError(f"WIDTHxHEIGHT is wanted, not {shown(text)}")
        size = int(width), int(height)
        wide, high = (min(most or edid.MOST, edid.MOST) for most in self.limit)
        if not (edid.LEAST <= size[0] <= wide and edid.LEAST <= size[1] <= high):
            raise ValueError(f"{text} is not between {edid.LEAST}x{edid.LEAST} and {wide}x{high}")
        if size[0] * size[1] * 4 > self.memory:
            raise ValueError(f"{text} needs more than {self.memory} bytes")
        return size

    def format(self, value: tuple[int, int]) -> str:
        """See `Kind.format`."""
        return f"{value[0]}x{value[1]}"


class Edid(Kind[str]):
    """``auto``, ``none``, or the bytes of an EDID in hexadecimal; what they mean is checked by the device."""

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        if text not in {AUTO, OFF}:
            try:
                return bytes.fromhex(text).hex() or OFF
            except ValueError:
                raise ValueError(f"{AUTO}, {OFF} or hexadecimal digits are wanted, not {shown(text)}") from None
        return text


def _mbochs(mdev: Mdev) -> MbochsDevice:
    device: MbochsDevice = mdev.drvdata
    return device


def plug_in(device: MbochsDevice, params: Mapping[str, Any]) -> None:
    """Plug in the monitor that create parameters describe; EINVAL for an EDID that is none."""
    device.configure(resolution=params["resolution"], monitor=params["monitor"], serial=params["serial"], edid=params["edid"])


def device_attributes(megabytes: int, limit: tuple[int, int], resolution: tuple[int, int]) -> tuple[Attribute[Any], ...]:
    """Return the attributes of a device with so much memory, whose type has this `limit` and monitor."""
    memory = Attribute("vendor/memory", Text(), "The size of the video memory.", show=lambda _: f"{megabytes} MB")
    return (COMPAT, memory, *_monitor(Resolution(limit, megabytes * _MEGABYTE), resolution), *LOOKING)


def _monitor(kind: Resolution, resolution: tuple[int, int]) -> tuple[Attribute[Any], ...]:
    return (
        Attribute(
            "resolution",
            kind,
            "What the monitor's EDID asks for, in pixels. The guest sees a change when it looks at the EDID again.",
            show=lambda mdev: _mbochs(mdev).wishes.resolution,
            store=lambda mdev, value: _mbochs(mdev).configure(resolution=value),
            create=True,
            default=resolution,
        ),
        Attribute(
            "monitor",
            Text(r"[\x20-\x7e]{1,13}", "1 to 13 characters of ASCII"),
            "The monitor's name in the EDID.",
            show=lambda mdev: _mbochs(mdev).wishes.monitor,
            store=lambda mdev, value: _mbochs(mdev).configure(monitor=value),
            create=True,
            default="mbochs",
        ),
        Attribute(
            "serial",
            Int(0, 2**32 - 1),
            "The monitor's serial number in the EDID.",
            show=lambda mdev: _mbochs(mdev).wishes.serial,
            store=lambda mdev, value: _mbochs(mdev).configure(serial=value),
            create=True,
            default=0,
        ),
        Attribute(
            "edid",
            Edid(),
            f"The EDID the guest sees, in hexadecimal; set that, {AUTO} (made from resolution, monitor and serial), or {OFF}.",
            show=lambda mdev: _mbochs(mdev).edid().hex() or OFF,
            store=lambda mdev, value: _mbochs(mdev).configure(edid=value),
            create=True,
            default=AUTO,
        ),
    )
