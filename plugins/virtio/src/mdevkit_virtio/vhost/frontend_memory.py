"""What a frontend shares with its backend: guest memory in one or several regions, and a dirty log of it.

A frontend's memory has three kinds of addresses. Here a guest address is an offset in the memfd, and the frontend's own
address is far from it and different in every region, so that a backend that mixes them up is found out. Any thread may
call in.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio import access
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.layout import LOG_PAGE_SHIFT
from mdevkit_virtio.vhost.proto import MemRegion

PAGE: Final = 1 << LOG_PAGE_SHIFT
_USER_BASE: Final = 0x5500_0000_0000
_USER_GAP: Final = 1 << 32


class SharedMemory:
    """`memory`, as the regions it is offered in: (guest address, bytes) each, by default one with all of it."""

    def __init__(self, memory: GuestMemory, regions: Sequence[tuple[int, int]] | None = None) -> None:
        self.memory: Final = memory
        self.regions: list[MemRegion] = []
        for guest, size in regions if regions is not None else [(0, memory.size)]:
            self.add(guest, size)

    def add(self, guest: int, size: int) -> MemRegion:
        """Offer one more region; EINVAL for one outside the memory."""
        if guest < 0 or size <= 0 or guest + size > self.memory.size:
            raise MdevError(errno.EINVAL, f"{size:#x} bytes at {guest:#x} are not in guest memory of {self.memory.size:#x}")
        used = {region.user - region.guest for region in self.regions}
        distance = next(d for n in range(len(used) + 1) if (d := _USER_BASE + n * _USER_GAP) not in used)
        region = MemRegion(guest, size, guest + distance, guest)
        self.regions.append(region)
        return region

    def user(self, guest: int) -> int:
        """Return the frontend's address of a guest address; EFAULT if that is in no region."""
        for region in self.regions:
            if region.guest <= guest < region.guest + region.size:
                return guest - region.guest + region.user
        raise MdevError(errno.EFAULT, f"guest address {guest:#x} is in no region that is shared")


class PageLog:
    """A dirty log for `size` bytes of guest memory: a memfd with one bit per page of `PAGE` bytes."""

    def __init__(self, size: int) -> None:
        pages = -(-size // PAGE)
        #: Bytes; whole 64-bit words, as QEMU's are.
        self.size: Final = -(-pages // 64) * 8
        self.fd: Final = os.memfd_create("dirty-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._give_back: Final = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        self._map: Final = mmap.mmap(self.fd, self.size)

    def pages(self) -> set[int]:
        """Return the numbers of the pages that are marked."""
        return {8 * at + bit for at, byte in enumerate(self._map[:]) if byte for bit in range(8) if byte >> bit & 1}

    def take(self) -> set[int]:
        """Return them, and mark them no more, while the device may go on: what is marked meanwhile is not lost.

        Look at the pages after that, not before.
        """
        found = self.pages()
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for page in found:
            access.clear_bit(host + page // 32 * 4, page % 32)
        return found

    def close(self) -> None:
        """Give it back, as forgetting it does; the backend keeps what it was given."""
        self._map.close()
        self._give_back()


def pages_of(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Return the pages that ranges (address, bytes) lie on."""
    return {page for at, size in ranges if size for page in range(at // PAGE, (at + size - 1) // PAGE + 1)}


def changed_pages(before: bytes, after: bytes) -> set[int]:
    """Return the pages in which two copies of memory differ."""
    return {at // PAGE for at in range(0, len(before), PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}
