"""The monitor on the card: the EDID region of VFIO, the same bytes as the guest finds them, and what is plugged in from the start.

A client that has a monitor of its own tells us of it through the region (link down, write blob and size, link up); no client of
vfio-user does, so that the default card comes with one. Used under the device's lock.
"""

from __future__ import annotations

import ctypes
from typing import Final

from mdevkit_vfio.pci.access import widths

from mdevkit_mbochs.mbochs import regs
from mdevkit_mbochs.mbochs.regs import EdidReg, Link

_NOTHING: Final = b""


class Monitor:
    """The EDID part of `state`. `limit` is the largest picture the card's type is meant for, 0 for no limit."""

    def __init__(self, state: regs.State, limit: tuple[int, int]) -> None:
        self._state: Final = state
        self._limit: Final = limit
        #: What is plugged in for each new client; nothing where the client is to bring it.
        self.own = _NOTHING

    @property
    def edid(self) -> bytes:
        """What the guest sees now: empty unless the link is up."""
        state = self._state
        return bytes(state.blob)[: state.edid_size] if state.link_state == Link.UP else _NOTHING

    def plug_in(self, blob: bytes) -> None:
        """Plug in a monitor with this EDID, for the next clients too; nothing for none."""
        self.own = blob
        self.restart()

    def restart(self) -> None:
        """Back to what was plugged in from the start: the last client's monitor has gone with it."""
        state = self._state
        ctypes.memmove(state.blob, self.own.ljust(regs.EDID_SIZE, b"\0"), regs.EDID_SIZE)
        state.edid_size = len(self.own)
        state.link_state = Link.UP if self.own else Link.UNSET

    def window_read(self, offset: int, size: int) -> int:
        """Read the guest's view of the blob."""
        return int.from_bytes(self.edid[offset : offset + size], "little")

    def read(self, offset: int, count: int) -> bytes:
        """Read the region. What is not there reads as zeros."""
        return b"".join(self._read(start, width) for start, width in widths(offset, count, 4))

    def _read(self, offset: int, width: int) -> bytes:
        at = offset - regs.EDID_BLOB
        if 0 <= at < regs.EDID_SIZE:
            return bytes(self._state.blob[at : at + width])
        value = self._register(offset) if width == 4 else 0
        return value.to_bytes(width, "little")

    def _register(self, offset: int) -> int:
        values = {
            EdidReg.OFFSET: regs.EDID_BLOB,
            EdidReg.MAX_SIZE: regs.EDID_SIZE,
            EdidReg.SIZE: self._state.edid_size,
            EdidReg.MAX_XRES: self._limit[0],
            EdidReg.MAX_YRES: self._limit[1],
            EdidReg.LINK_STATE: self._state.link_state,
        }
        return values.get(EdidReg(offset), 0) if offset in values else 0

    def write(self, offset: int, data: bytes) -> None:
        """Write the region. Read-only registers, impossible values and what is not there are ignored; the blob is not checked."""
        for start, width in widths(offset, len(data), 4):
            self._write(start, data[start - offset :][:width])

    def _write(self, offset: int, data: bytes) -> None:
        state, at = self._state, offset - regs.EDID_BLOB
        value = int.from_bytes(data, "little")
        if 0 <= at < regs.EDID_SIZE:
            state.blob[at : at + len(data)] = list(data)
        elif len(data) == 4 and offset == EdidReg.SIZE and value <= regs.EDID_SIZE:
            state.edid_size = value
        elif len(data) == 4 and offset == EdidReg.LINK_STATE and value <= Link.DOWN:
            state.link_state = value
