"""The sub-function of flavour ``mdev``: a PCI function of its own that sends and receives one frame at a time.

A guest's driver gives a buffer's address and length and rings a doorbell; an interrupt tells that it is done. State is one
structure of fixed layout. Threads as in `mdevkit_vfio.pci`: registers under the lock on the client's thread, frames from the
eswitch on any thread.
"""

from __future__ import annotations

import ctypes
from typing import Final

from mdevkit_vfio.migration import Migration
from mdevkit_vfio.pci import Bar, PciDevice, PciIds

from mdevkit_subfunction import regs
from mdevkit_subfunction.eswitch import Eswitch, Port

_SIZE: Final = 4


class Registers(ctypes.LittleEndianStructure):
    """The window as the guest sees it, and whether a receive buffer is posted."""

    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("sfnum", ctypes.c_uint32),
        ("hw_addr", ctypes.c_uint8 * 8),
        ("tx_addr", ctypes.c_uint64),
        ("tx_length", ctypes.c_uint32),
        ("tx_doorbell", ctypes.c_uint32),
        ("rx_addr", ctypes.c_uint64),
        ("rx_length", ctypes.c_uint32),
        ("rx_doorbell", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
        ("rx_posted", ctypes.c_uint32),
    )


class SubfunctionDevice(PciDevice):
    """One sub-function as a PCI device on port `port`."""

    def __init__(self, eswitch: Eswitch, port: Port, name: str) -> None:
        ids = PciIds(vendor=regs.VENDOR_ID, device=regs.DEVICE_ID, class_code=regs.CLASS_CODE)
        super().__init__(ids, {0: Bar(regs.BAR_SIZE)}, interrupt_pin=1, name=name)
        self._eswitch: Final = eswitch
        self._port: Final = port
        self._stopped = False
        self.regs: Final = Registers()
        self._bytes: Final = memoryview(self.regs).cast("B")
        self.migration = Migration(
            save=lambda: bytes(self._bytes), load=self._load, stop=self._stop, resume=self._resume, lock=self.lock
        )
        self.device_reset()

    def device_reset(self) -> None:
        """See `PciDevice.device_reset`."""
        self._bytes[:] = bytes(len(self._bytes))
        self._identify()

    def _identify(self) -> None:
        self.regs.magic, self.regs.sfnum = regs.MAGIC_VALUE, self._port.sfnum
        self.regs.hw_addr[:6] = self._port.hw_addr

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`: registers behind the last one read as 0."""
        del bar
        return int.from_bytes(self._bytes[offset : offset + size], "little") if offset < Registers.rx_posted.offset else 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`: whole registers only, as the window's are."""
        del bar
        if size != _SIZE:
            return
        if offset == regs.STATUS:
            self.regs.status &= ~value
            self.interrupt(self.regs.status != 0)
        elif offset == regs.TX_DOORBELL:
            self.defer(self._send)
        elif offset == regs.RX_DOORBELL:
            self.regs.rx_posted = 1
        elif regs.TX_ADDR_LO <= offset < regs.STATUS:
            self._bytes[offset : offset + size] = value.to_bytes(size, "little")

    def _send(self) -> None:
        with self.lock:
            address, length = self.regs.tx_addr, self.regs.tx_length
        try:
            frame = self.dma.read(address, length) if 0 < length <= regs.MAX_FRAME else b""
        except OSError:  # the guest gave an address it does not have
            frame = b""
        if frame:
            self._eswitch.forward(self._port, frame)
        self._finish(regs.TX_DONE if frame else regs.TX_DONE | regs.FAULT)

    def deliver(self, frame: bytes) -> bool:
        """See `eswitch.Function.deliver`: there is room for one frame, where the guest has posted a buffer for it."""
        with self.lock:
            if self._stopped or not self.regs.rx_posted or len(frame) > self.regs.rx_length:
                return False
            self.regs.rx_posted = 0
            address = self.regs.rx_addr
        self.defer(lambda: self._receive(address, frame))
        return True

    def _receive(self, address: int, frame: bytes) -> None:
        try:
            self.dma.write(address, frame)
        except OSError:
            self._finish(regs.RX_DONE | regs.FAULT)
            return
        with self.lock:
            self.regs.rx_length = len(frame)
        self._finish(regs.RX_DONE)

    def _finish(self, bits: int) -> None:
        with self.lock:
            self.regs.status |= bits
            self.interrupt(True)

    def _load(self, data: bytes) -> None:
        self._bytes[:] = data
        self._identify()
        self.interrupt(self.regs.status != 0)

    def _stop(self) -> None:
        self._stopped = True

    def _resume(self) -> None:
        self._stopped = False
