"""The sub-function of flavour ``mdev``: a PCI function of its own that sends and receives one frame at a time.

A guest's driver gives a buffer's address and length and rings a doorbell; an interrupt tells that it is done. State is one
structure of fixed layout, without what the port says of the sub-function. Threads as in `mdevkit_vfio.pci`: registers under the
lock on the client's thread, frames from the eswitch on any thread, guest memory on the device's worker.
"""

from __future__ import annotations

import ctypes
import errno
import zlib
from typing import Final, NoReturn

from mdevkit.errors import MdevError
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.pci import Bar, PciDevice, PciIds

from mdevkit_subfunction import regs
from mdevkit_subfunction.eswitch import Eswitch, Port

_SIZE: Final = 4
#: Begins a migration stream: "SDM1". A check sum of 4 bytes ends it.
_STREAM_MAGIC: Final = 0x314D4453


class State(ctypes.LittleEndianStructure):
    """What a guest has written and been told, and what is under way."""

    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
        ("tx_addr", ctypes.c_uint64),
        ("rx_addr", ctypes.c_uint64),
        ("tx_length", ctypes.c_uint32),
        ("rx_length", ctypes.c_uint32),
        #: Whether a frame is to be sent, and whether there is a buffer for one to come.
        ("tx_posted", ctypes.c_uint32),
        ("rx_posted", ctypes.c_uint32),
    )


_STATE_SIZE: Final = ctypes.sizeof(State)


def _halves(name: str, low: int) -> dict[int, tuple[str, int]]:
    return {low: (name, 0), low + 4: (name, 32)}


#: Registers a guest writes, by offset: field of the state, and the bits' place in it.
_WRITABLE: Final = {
    **_halves("tx_addr", regs.TX_ADDR_LO),
    regs.TX_LENGTH: ("tx_length", 0),
    **_halves("rx_addr", regs.RX_ADDR_LO),
    regs.RX_LENGTH: ("rx_length", 0),
}


class SubfunctionDevice(PciDevice):
    """One sub-function as a PCI device on port `port`."""

    def __init__(self, eswitch: Eswitch, port: Port, name: str) -> None:
        ids = PciIds(vendor=regs.VENDOR_ID, device=regs.DEVICE_ID, class_code=regs.CLASS_CODE)
        super().__init__(ids, {0: Bar(regs.BAR_SIZE)}, interrupt_pin=1, name=name)
        self._eswitch: Final = eswitch
        self._port: Final = port
        self._stopped = False
        #: The frame that is being written into the posted buffer.
        self._arriving: bytes | None = None
        self.state: Final = State()
        self.migration = Migration(save=self._save, load=self._load, stop=self._stop, resume=self._resume, lock=self.lock)
        self.device_reset()

    def device_reset(self) -> None:
        """See `PciDevice.device_reset`."""
        ctypes.memset(ctypes.addressof(self.state), 0, _STATE_SIZE)
        self.state.magic = _STREAM_MAGIC
        self._arriving = None

    # -- registers, under the lock -----------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`: bytes of registers can be read, those behind the last one are 0."""
        del bar
        window = b"".join(self._register(at).to_bytes(_SIZE, "little") for at in range(offset & -_SIZE, offset + size, _SIZE))
        return int.from_bytes(window[offset % _SIZE :][:size], "little")

    def _register(self, offset: int) -> int:
        """Return the register at a multiple of 4."""
        address = self._port.hw_addr
        fixed: dict[int, int] = {
            regs.MAGIC: regs.MAGIC_VALUE,
            regs.SFNUM: self._port.sfnum,
            regs.HW_ADDR: int.from_bytes(address[:4], "little"),
            regs.HW_ADDR + 4: int.from_bytes(address[4:], "little"),
            regs.STATUS: self.state.status,
        }
        if offset in _WRITABLE:
            name, shift = _WRITABLE[offset]
            return int(getattr(self.state, name)) >> shift & 0xFFFFFFFF
        return fixed.get(offset, 0)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`: whole registers only, as the window's are."""
        del bar
        if size != _SIZE:
            return
        if offset == regs.STATUS:
            self.state.status &= ~value
            self.interrupt(self.state.status != 0)
        elif offset == regs.TX_DOORBELL:
            self.state.tx_posted = 1
            self.defer(self._send)
        elif offset == regs.RX_DOORBELL:
            self.state.rx_posted = 1
        elif offset in _WRITABLE:
            name, shift = _WRITABLE[offset]
            setattr(self.state, name, getattr(self.state, name) & ~(0xFFFFFFFF << shift) | value << shift)

    def _happened(self, bits: int) -> None:
        self.state.status |= bits
        self.interrupt(True)

    # -- frames, on the worker ----------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Send the posted frame. It is sent and told of, or, where migration has stopped the device, still to be sent."""
        with self.lock:
            address, length = self.state.tx_addr, self.state.tx_length
        try:
            frame = self.dma.read(address, length) if 0 < length <= regs.MAX_FRAME else b""
        except OSError:  # the guest gave an address it does not have
            frame = b""
        with self.lock:
            if self._stopped or not self.state.tx_posted:
                return
            self.state.tx_posted = 0
            self._happened(regs.TX_DONE if frame else regs.TX_DONE | regs.FAULT)
        if frame:
            self._eswitch.forward(self._port, frame)

    def deliver(self, frame: bytes) -> bool:
        """See `eswitch.Function.deliver`: there is room for one frame, where the guest has posted a buffer for it."""
        with self.lock:
            if self._stopped or self._arriving is not None or not self.state.rx_posted or len(frame) > self.state.rx_length:
                return False
            self._arriving = frame
        self.defer(self._receive)
        return True

    def _receive(self) -> None:
        """Write the frame into the posted buffer, which stays posted if the device is stopped or reset meanwhile."""
        with self.lock:
            frame, address = self._arriving, self.state.rx_addr
        if frame is None:
            return
        fault = 0
        try:
            self.dma.write(address, frame)
        except OSError:
            fault = regs.FAULT
        with self.lock:
            if self._arriving is not frame:
                return  # a reset has thrown it away; there may be another one by now, which has its own turn
            self._arriving = None
            if not self._stopped:
                self.state.rx_posted, self.state.rx_length = 0, len(frame)
                self._happened(regs.RX_DONE | fault)

    # -- migration, under the lock ------------------------------------------------------------------------------------------

    def _save(self) -> bytes:
        state = bytes(self.state)
        return state + zlib.crc32(state).to_bytes(4, "little")

    def _load(self, data: bytes) -> None:
        """Take over a stream, or leave everything as it is: EINVAL for one that no sub-function has written."""
        state = State.from_buffer_copy(data)
        if state.magic != _STREAM_MAGIC:
            _refuse(f"magic number {state.magic:#x}, not {_STREAM_MAGIC:#x}")
        if data[_STATE_SIZE:] != zlib.crc32(data[:_STATE_SIZE]).to_bytes(4, "little"):
            _refuse("the check sum is wrong")
        if state.status & ~(regs.TX_DONE | regs.RX_DONE | regs.FAULT) or max(state.tx_posted, state.rx_posted) > 1:
            _refuse("it has bits that no sub-function has")
        ctypes.memmove(ctypes.addressof(self.state), data, _STATE_SIZE)
        self.interrupt(self.state.status != 0)

    def _stop(self) -> None:
        self._stopped = True

    def _resume(self) -> None:
        self._stopped = False
        if self.state.tx_posted:
            self.defer(self._send)


def _refuse(sentence: str) -> NoReturn:
    raise MdevError(errno.EINVAL, f"migration stream: {sentence}")
