"""The card: video memory, eleven dispi registers that say what of it is shown, and a monitor.

`MbochsDevice` works as one would expect; `SampleMbochs` is ``compat=linux``, the Linux sample to the byte. No write is ever
refused: whether the registers make a mode is asked when somebody looks.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, replace
from typing import Any, Final

from mdevkit.errors import MdevError
from mdevkit.screen import PIXEL_SIZE, Frame
from mdevkit_vfio.ops import GfxPlane, RegionInfo
from mdevkit_vfio.pci import Bar
from mdevkit_vfio.uapi import RegionFlag

from mdevkit_mbochs import edid
from mdevkit_mbochs.attributes import AUTO, OFF
from mdevkit_mbochs.display import DRM_FORMAT_XRGB8888, FRAMEBUFFER, DisplayDevice, SampleQuirks
from mdevkit_mbochs.mbochs import regs
from mdevkit_mbochs.mbochs.monitor import Monitor
from mdevkit_mbochs.mbochs.regs import Dispi, Enable

_PAGE: Final = 4096
#: DRM_PLANE_TYPE_PRIMARY.
PRIMARY: Final = 1

_READ_WRITE: Final = RegionFlag.READ | RegionFlag.WRITE


@dataclass(frozen=True)
class Wishes:
    """What a user wants the monitor to be: `edid` in hexadecimal, ``none``, or ``auto`` for one made of the other three."""

    resolution: tuple[int, int] = (1024, 768)
    monitor: str = "mbochs"
    serial: int = 0
    edid: str = OFF


class MbochsDevice(DisplayDevice):
    """A display with `memory_size` bytes of video memory. `limit`: the most pixels a side, which EDID tells; 0 for no limit."""

    num_regions = regs.EDID_REGION + 1

    def __init__(self, memory_size: int, limit: tuple[int, int] = (0, 0), *, name: str = "mbochs") -> None:
        # The kit does not know other sizes than these; 4 bytes at once are what the sample gets of wider accesses.
        registers = {regs.MMIO: Bar(regs.MMIO_SIZE, widest=4)}
        super().__init__((regs.VENDOR_ID, regs.DEVICE_ID), memory_size, registers=registers, name=name)
        self._state: Final = regs.State()
        self._monitor: Final = Monitor(self._state, limit)
        self._limit: Final = limit
        #: What the user has asked for; no monitor at first. Read it on any thread, change it with `configure`.
        self.wishes = Wishes()
        #: What somebody has been told of, by id, from 1 on.
        self._exported: Final[list[Frame]] = []
        self.device_reset()

    # -- registers ---------------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`: the EDID, and dispi registers 2 bytes at a time; the rest reads 0."""
        del bar  # the other is memory
        if offset < regs.EDID_SIZE:
            return self._monitor.window_read(offset, size)
        index = (offset - regs.DISPI) // 2
        if size == 2 and 0 <= index < regs.DISPI_COUNT:
            return self._state.dispi[index]
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`: dispi registers, 2 bytes at a time."""
        del bar  # the other is memory
        index = (offset - regs.DISPI) // 2
        if size == 2 and 0 <= index < regs.DISPI_COUNT:
            self._state.dispi[index] = value

    def device_reset(self) -> None:
        """Power on; monitor and video memory stay as they are."""
        state = self._state
        ctypes.memset(state.dispi, 0, ctypes.sizeof(state.dispi))
        state.dispi[Dispi.ID] = regs.IDENTITY
        state.dispi[Dispi.MEMORY_64K] = self.memory_size // regs.MEMORY_UNIT

    def device_detached(self) -> None:
        """See `PciDevice.device_detached`: what the client brought goes with it."""
        self._exported.clear()
        self._monitor.restart()

    def device_checkpoint(self) -> bytes:
        """See `PciDevice.device_checkpoint`."""
        return bytes(self._state)

    def device_restore(self, state: bytes) -> None:
        """See `PciDevice.device_restore`: EINVAL for what has not the length of a state, another version's perhaps."""
        if len(state) != ctypes.sizeof(self._state):
            raise MdevError(errno.EINVAL, f"{self.name}: {len(state)} bytes are not the state of this card", self)
        ctypes.memmove(ctypes.addressof(self._state), state, ctypes.sizeof(self._state))

    # -- the monitor -------------------------------------------------------------------------------------------------

    def edid(self) -> bytes:
        """Return what the guest sees, empty without a monitor; any thread."""
        with self.lock:
            return self._monitor.edid

    def configure(self, **changes: Any) -> None:
        """Change what is wished of the monitor, `Wishes` by name, and plug it in; any thread.

        EINVAL for an EDID that is none; then everything stays as it was. There is no interrupt to tell the guest: it finds out
        when it looks again.
        """
        with self.lock:
            wishes = replace(self.wishes, **changes)
            blob = self._blob(wishes)
            try:
                if blob:
                    edid.check(blob, regs.EDID_SIZE)
            except ValueError as error:
                raise MdevError(errno.EINVAL, f"{self.name}: {error}", self) from None
            self.wishes = wishes
            self._monitor.plug_in(blob)

    def _blob(self, wishes: Wishes) -> bytes:
        """Return the EDID that is wished for."""
        if wishes.edid != AUTO:
            return b"" if wishes.edid == OFF else bytes.fromhex(wishes.edid)
        return edid.generate(*wishes.resolution, name=wishes.monitor, serial=wishes.serial, limit=self._limit)

    # -- regions and planes ------------------------------------------------------------------------------------------

    def region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO: the EDID region comes after PCI's."""
        if index == regs.EDID_REGION:
            return RegionInfo(_READ_WRITE, regs.EDID_REGION_SIZE, type=regs.EDID_TYPE)
        return super().region_info(index)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read the EDID region."""
        return self._monitor.read(offset, count) if region == regs.EDID_REGION else super().region_read(region, offset, count)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """Write the EDID region."""
        if region == regs.EDID_REGION:
            self._monitor.write(offset, data)
        else:
            super().region_write(region, offset, data)

    def frame(self) -> Frame | None:
        """See `DisplayDevice.frame`: what the registers say, if that is a mode and lies in the video memory."""
        with self.lock:
            values = list(self._state.dispi)
        width, height = values[Dispi.XRES], values[Dispi.YRES]
        stride = max(values[Dispi.VIRT_WIDTH], width) * PIXEL_SIZE
        offset = values[Dispi.X_OFFSET] * PIXEL_SIZE + values[Dispi.Y_OFFSET] * stride
        possible = values[Dispi.BPP] == regs.BITS_PER_PIXEL and min(width, height) >= regs.LEAST
        if values[Dispi.ENABLE] & Enable.ENABLED and possible and offset + stride * height <= self.memory_size:
            return Frame(width, height, stride, offset)
        return None

    def query_gfx_plane(self, plane_type: int) -> GfxPlane:
        """QUERY_GFX_PLANE: the primary plane as a DMA buffer, by an id that stays the mode's until the client leaves.

        All zero for other planes and while there is no mode.
        """
        with self.lock:
            frame = self.frame() if plane_type == PRIMARY else None
            if frame is None:
                return GfxPlane()
            if frame not in self._exported:
                self._exported.append(frame)
                self._new_mode()
            number = self._exported.index(frame) + 1
        return GfxPlane(
            drm_format=DRM_FORMAT_XRGB8888,
            width=frame.width,
            height=frame.height,
            stride=frame.stride,
            size=frame.stride * frame.height,
            dmabuf_id=number,
        )

    def _new_mode(self) -> None:
        """Take note of a mode that nobody has asked about before."""

    def gfx_dmabuf(self, dmabuf_id: int) -> int:
        """GET_GFX_DMABUF: the picture of a plane that was queried, in a buffer that outlives the client.

        A userspace device has no DMA buffers: the descriptor is one of the video memory, and its file position that of the
        picture's first byte. Reads and writes through it and through BAR 0 are the same. ENOENT for an unknown id, EINVAL for a
        picture that does not begin at a page.
        """
        with self.lock:
            if not 0 < dmabuf_id <= len(self._exported):
                raise MdevError(errno.ENOENT, f"{self.name} has no DMA buffer {dmabuf_id}", self)
            frame = self._exported[dmabuf_id - 1]
            if frame.offset % _PAGE:
                message = f"{self.name}: a picture {frame.offset} bytes into the memory does not begin at a page"
                raise MdevError(errno.EINVAL, message, self)
            fd = self.open_memory(os.O_RDWR)
        os.lseek(fd, frame.offset, os.SEEK_SET)
        return fd


class SampleMbochs(SampleQuirks, MbochsDevice):
    """The Linux sample.

    Reads and writes of video memory by message land two pages beyond where a mapping does; there is no monitor until a client
    brings one; the first query of a mode nobody has asked about is ENOMEM, the next one works.
    """

    _SHIFT: Final = 2 * _PAGE

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read; beyond the end of video memory there are zeros."""
        if region != FRAMEBUFFER:
            return super().read(region, offset, count)
        at = offset + self._SHIFT
        return self.bar_memory(FRAMEBUFFER)[at : at + count].ljust(count, b"\0")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write; what comes after the end of video memory is lost."""
        if region != FRAMEBUFFER:
            super().write(region, offset, data)
            return
        at = offset + self._SHIFT
        fitting = data[: max(0, self.memory_size - at)]
        self.bar_memory(FRAMEBUFFER)[at : at + len(fitting)] = fitting

    def _blob(self, wishes: Wishes) -> bytes:
        """Bring no monitor of our own."""
        return b"" if wishes.edid == AUTO else super()._blob(wishes)

    def _new_mode(self) -> None:
        raise MdevError(errno.ENOMEM, f"{self.name}: the first query of a mode fails; ask again", self)
