"""The card: a framebuffer that shows a grey gradient until somebody draws on it.

`MdpyDevice` works as one would expect; `SampleMdpy` is ``compat=linux``, the Linux sample to the byte.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.screen import PIXEL_SIZE, Frame
from mdevkit_vfio.ops import GfxPlane, RegionInfo
from mdevkit_vfio.pci.access import widths
from mdevkit_vfio.uapi import PCI_NUM_REGIONS, RegionFlag

from mdevkit_mbochs.display import DRM_FORMAT_XRGB8888, FRAMEBUFFER, DisplayDevice, SampleQuirks
from mdevkit_mbochs.mdpy import regs


class MdpyDevice(DisplayDevice):
    """A display of `width` x `height` pixels."""

    num_regions = regs.DISPLAY_REGION + 1

    def __init__(self, width: int, height: int, *, name: str = "mdpy") -> None:
        # A base address register has a power of two.
        size = 1 << (width * height * PIXEL_SIZE - 1).bit_length()
        super().__init__((regs.VENDOR_ID, regs.DEVICE_ID), size, capabilities=[regs.capability(width, height)], name=name)
        self._frame: Final = Frame(width, height, width * PIXEL_SIZE)
        self._has_client = self._drawn = False

    def frame(self) -> Frame | None:
        """See `DisplayDevice.frame`: always there, drawn when it is wanted first."""
        with self.lock:
            if not self._drawn:
                self._draw()
        return self._frame

    def device_attached(self) -> None:
        """See `PciDevice.device_attached`: what the client is about to map has to be there."""
        self._has_client = True
        self.frame()

    def device_detached(self) -> None:
        """See `PciDevice.device_detached`."""
        self._has_client = False

    def device_reset(self) -> None:
        """Draw the gradient; without a client, when somebody looks."""
        self._drawn = False
        if self._has_client:
            self._draw()

    def adopt(self, files: Mapping[str, int]) -> None:
        """See `Parkable.adopt`: the picture is there."""
        super().adopt(files)
        self._drawn = True

    def _draw(self) -> None:
        """Draw from black at the top to nearly white at the bottom."""
        self._drawn = True
        frame = self._frame
        rows = (bytes([row * 255 // frame.height]) * frame.stride for row in range(frame.height))
        self.bar_memory(FRAMEBUFFER)[: frame.height * frame.stride] = b"".join(rows)

    def device_checkpoint(self) -> bytes:
        """See `PciDevice.device_checkpoint`: all there is lies in the framebuffer."""
        return b""

    def device_restore(self, state: bytes) -> None:
        """See `PciDevice.device_restore`."""

    def region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO: the framebuffer at the display region's index, too; nothing between it and the PCI regions."""
        if PCI_NUM_REGIONS <= index < regs.DISPLAY_REGION:
            return self._between(index)
        return super().region_info(FRAMEBUFFER if index == regs.DISPLAY_REGION else index)

    def _between(self, index: int) -> RegionInfo:
        del index
        return RegionInfo(RegionFlag(0), 0)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read the display region."""
        return (
            self.read(FRAMEBUFFER, offset, count) if region == regs.DISPLAY_REGION else super().region_read(region, offset, count)
        )

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """Write the display region."""
        if region == regs.DISPLAY_REGION:
            self.write(FRAMEBUFFER, offset, data)
        else:
            super().region_write(region, offset, data)

    def query_gfx_plane(self, plane_type: int) -> GfxPlane:
        """QUERY_GFX_PLANE: the display region, whole, for any type of plane."""
        del plane_type
        frame = self._frame
        return GfxPlane(
            drm_format=DRM_FORMAT_XRGB8888,
            width=frame.width,
            height=frame.height,
            stride=frame.stride,
            size=self.memory_size,
            region_index=regs.DISPLAY_REGION,
        )


class SampleMdpy(SampleQuirks, MdpyDevice):
    """The Linux sample. Reads and writes by message always hit the first bytes of the framebuffer: a mapping is the way in."""

    #: The display region is beyond what GET_INFO tells of.
    num_regions = PCI_NUM_REGIONS

    def _between(self, index: int) -> RegionInfo:
        raise MdevError(errno.EINVAL, f"{self.name} has no region {index}", self)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read; the framebuffer 4 bytes at a time, each from its beginning."""
        if region != FRAMEBUFFER:
            return super().read(region, offset, count)
        memory = self.bar_memory(FRAMEBUFFER)
        return b"".join(memory[:width] for _, width in widths(offset, count, 4))

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write; as `read`."""
        if region != FRAMEBUFFER:
            super().write(region, offset, data)
            return
        memory = self.bar_memory(FRAMEBUFFER)
        for start, width in widths(offset, len(data), 4):
            memory[:width] = data[start - offset :][:width]
