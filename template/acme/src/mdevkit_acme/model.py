"""The card: registers in, checksums out. It knows PCI through the kit, and nothing of sockets and guests.

`bar_read`, `bar_write` and `device_reset` are called with `lock` held; jobs run on the device's worker thread.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import zlib
from functools import partial

from mdevkit import MdevError
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.pci import Bar, PciDevice, PciIds

from mdevkit_acme.regs import BAR_SIZE, IDENTITY, Control, Reg, State, Status

# Made up: use the vendor id that is yours. The class is "processing accelerator".
IDS = PciIds(vendor=0xAC3E, device=0xC3C0, class_code=0x120000)

#: What a saved state begins with: whose it is, and the version of its layout.
_HEADER = struct.Struct("<II")
_VERSION = 1


class AcmeDevice(PciDevice):
    """One card. `limit` is the longest job in bytes, `serial` a number of 32 bits the guest can read."""

    def __init__(self, limit: int, serial: int, name: str = "acme") -> None:
        super().__init__(IDS, {0: Bar(BAR_SIZE)}, msi_vectors=1, name=name)
        self.limit = limit
        self.serial = serial
        self.jobs = 0
        self._state = State()
        self._run_number = 0
        self.migration = Migration(save=self._save, load=self._load, stop=self._forget_job, resume=self._go_on, lock=self.lock)

    # -- registers -----------------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Read a register, or a part of it."""
        del bar  # the card has one
        value = self._registers().get(offset & ~3, 0)
        return value >> 8 * (offset & 3) & ((1 << 8 * size) - 1)

    def _registers(self) -> dict[int, int]:
        state = self._state
        return {
            Reg.ID: IDENTITY,
            Reg.SERIAL: self.serial,
            Reg.STATUS: state.status,
            Reg.LENGTH: state.length,
            Reg.ADDRESS_LOW: state.address_low,
            Reg.ADDRESS_HIGH: state.address_high,
            Reg.RESULT: state.result,
        }

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register; anything but 4 bytes is ignored, and while a job runs everything is."""
        del bar  # the card has one
        state = self._state
        if size != 4 or state.status & Status.BUSY:
            return
        if offset == Reg.CONTROL and value & Control.START:
            self._start()
        elif offset == Reg.STATUS:
            state.status &= ~value
        elif offset == Reg.LENGTH:
            state.length = min(value, self.limit)
        elif offset == Reg.ADDRESS_LOW:
            state.address_low = value
        elif offset == Reg.ADDRESS_HIGH:
            state.address_high = value

    def device_reset(self) -> None:
        """Power-on values; a job that runs is forgotten."""
        self._forget_job()
        ctypes.memset(ctypes.byref(self._state), 0, ctypes.sizeof(self._state))

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._state.status = Status.BUSY
        self._go_on()

    def _go_on(self) -> None:
        """Begin, or after a migration begin again, the job the registers describe."""
        if self._state.status & Status.BUSY:
            self._run_number += 1
            # DMA inside a register access would keep the guest waiting for itself; `defer` leaves it first.
            self.defer(partial(self._job, self._run_number))

    def _forget_job(self) -> None:
        """Make the result of a job that still runs count for nothing."""
        self._run_number += 1

    def _job(self, run_number: int) -> None:
        """Compute; runs without the lock, so the registers may have changed when the data is there."""
        with self.lock:
            address = self._state.address_high << 32 | self._state.address_low
            length = self._state.length
        try:
            result, status = zlib.crc32(self.dma.read(address, length)), Status.DONE
        except OSError:  # the guest named memory it does not have
            result, status = 0, Status.ERROR
        with self.lock:
            if run_number == self._run_number:
                self._state.result, self._state.status = result, status
                self.jobs += 1
                self.trigger_msi()

    # -- migration -----------------------------------------------------------------------------------------------------

    def _save(self) -> bytes:
        return _HEADER.pack(IDENTITY, _VERSION) + bytes(self._state)

    def _load(self, data: bytes) -> None:
        """Take over a saved state. It comes from outside: everything is checked before anything is changed."""
        if _HEADER.unpack_from(data) != (IDENTITY, _VERSION):
            raise MdevError(errno.EINVAL, f"{self.name}: this is no state of an acme card of version {_VERSION}")
        state = State.from_buffer_copy(data, _HEADER.size)
        if state.length > self.limit or state.status not in {0, Status.BUSY, Status.DONE, Status.ERROR}:
            raise MdevError(errno.EINVAL, f"{self.name}: length {state.length} or status {state.status:#x} is not possible")
        self._state = state
