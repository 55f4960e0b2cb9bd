"""Guest memory as a client offers it to a device. Any thread may read and write it, as on a machine."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_vfio import proto
from mdevkit_vfio.memory import sealed_memfd
from mdevkit_vfio.proto import Command


class GuestMemory:
    """`size` bytes of zeros at guest address `iova`.

    `fd` is a memfd to share with the server, or -1 if the server is to ask for the data. `data` holds the bytes in either
    case. `readable` and `writable` are from the device's point of view.
    """

    def __init__(self, iova: int, size: int, *, shared: bool, readable: bool = True, writable: bool = True) -> None:
        self.iova: Final = iova
        self.size: Final = size
        self.readable: Final = readable
        self.writable: Final = writable
        self.fd: Final = sealed_memfd("guest", size) if shared else -1
        try:
            self.data: Final = mmap.mmap(self.fd, size)
        except OSError:
            self._close_fd()
            raise

    def read(self, iova: int, count: int) -> bytes:
        """Return `count` bytes at guest address `iova`; EFAULT outside the memory, or once it is closed."""
        at = self._at(iova, count)
        try:
            return self.data[at : at + count]
        except ValueError:
            raise self._closed() from None

    def write(self, iova: int, data: bytes) -> None:
        """Write `data` at guest address `iova`; EFAULT outside the memory, or once it is closed."""
        at = self._at(iova, len(data))
        try:
            self.data[at : at + len(data)] = data
        except ValueError:
            raise self._closed() from None

    def close(self) -> None:
        """Give the memory back; the server keeps what it has been given."""
        self.data.close()
        self._close_fd()

    def request(self) -> bytes:
        """Return the payload of the DMA_MAP that offers it."""
        flags = proto.DMA_READABLE * self.readable | proto.DMA_WRITEABLE * self.writable
        return proto.DmaMap(flags, 0, self.iova, self.size).pack()

    def holds(self, iova: int, count: int) -> bool:
        """Whether all of a range is in it."""
        return self.iova <= iova and iova + count <= self.iova + self.size

    def answer(self, command: int, access: proto.DmaAccess, data: bytes) -> bytes:
        """Do what a DMA message asks for and return the reply's payload; EACCES where the device has no right."""
        if not (self.readable if command == Command.DMA_READ else self.writable):
            raise MdevError(errno.EACCES, f"the device may not do {proto.command_name(command)} at {access.iova:#x}")
        if command == Command.DMA_READ:
            return access.pack() + self.read(access.iova, access.count)
        self.write(access.iova, data)
        return access.pack()

    def _at(self, iova: int, count: int) -> int:
        if count < 0 or not self.holds(iova, count):
            raise MdevError(errno.EFAULT, f"{count} bytes at {iova:#x} are outside {self.iova:#x}+{self.size:#x}")
        return iova - self.iova

    def _closed(self) -> MdevError:
        return MdevError(errno.EFAULT, f"the memory at {self.iova:#x} is closed")

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
