"""Guest memory as a virtio device sees it: the table of regions a frontend has shared, and its dirty log.

A table never changes. When a region comes or goes a new table takes its place, between two bursts, so that no burst ever
sees half of a change; a region's mapping goes away with the last table that has it.

Nothing here reads or writes through the mappings: the files behind them are the client's, who may truncate them, and an
access beyond the end raises SIGBUS. That is for the engines, each with its own protection. Any thread may call in.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

#: Regions one client may have: what design and vhost-user's CONFIGURE_MEM_SLOTS offer at most.
MAX_REGIONS: Final = 1024

#: Bytes one client may have us map at a time, as memory or as a log. Address space is shared by all devices of the process, and has
#: 47 bits on x86-64; files are as large as a client says, for free.
MAX_MAPPED: Final = 1 << 40

_ADDRESS_LIMIT: Final = 1 << 64


_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def _load() -> tuple[Callable[[None, int, int, int, int, int], int | None], Callable[[int, int], int]]:
    """Return mmap(2) and munmap(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc.mmap, libc.munmap


_mmap, _munmap = _load()


class Piece(NamedTuple):
    """A range that is contiguous in guest memory and in our address space."""

    guest: int
    host: int
    length: int


class Mapping:
    """Part of a client's file in our address space, from `offset` on for `size` bytes; unmapped when nobody uses it any more.

    The descriptor stays the caller's, and none of ours is used: `mmap.mmap` would keep one for each mapping, and a client may
    have very many. ENOTSUP for a file that is not on memfd, tmpfs or hugetlbfs, EACCES for one that is not open for reading and
    writing, EINVAL for one that is too short.
    """

    def __init__(self, fd: int, size: int, offset: int = 0) -> None:
        _check_file(fd, offset + size)
        # Mappings start and end at whole pages of the file, which are large ones on hugetlbfs.
        page = max(os.fstat(fd).st_blksize, mmap.PAGESIZE)
        before = offset % page
        length = -(-(before + size) // page) * page
        base = _mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset - before)
        if base is None or base == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise MdevError(errno.EINVAL, f"guest memory of {size} bytes cannot be mapped: {reason}")
        # Not at exit: threads of ours may use it to the very end.
        weakref.finalize(self, _munmap, base, length).atexit = False
        #: Where it is in our address space.
        self.host: Final = base + before
        self.size: Final = size


class Region:
    """One range of guest memory: `size` bytes at guest address `guest`, at `user` in the frontend's own address space."""

    __slots__ = ("guest", "host", "mapping", "size", "user")

    def __init__(self, fd: int, guest: int, size: int, *, offset: int = 0, user: int | None = None) -> None:
        self.guest: Final = guest
        self.size: Final = size
        self.user: Final = guest if user is None else user
        ends = (guest + size, self.user + size, offset + size)
        # The last byte of the address space is nobody's: an end of 2^64 would be 0 in 64 bits.
        if size <= 0 or min(guest, self.user, offset) < 0 or max(ends[:2]) >= _ADDRESS_LIMIT or ends[2] >= 1 << 63:
            raise MdevError(errno.EINVAL, f"{self} at file offset {offset:#x} is not possible")
        self.mapping: Final = Mapping(fd, size, offset)
        self.host: Final = self.mapping.host

    def __str__(self) -> str:
        return f"the guest memory region of {self.size:#x} bytes at {self.guest:#x}"


class MemoryTable:
    """Regions in order of their guest addresses. EEXIST if two overlap, ENOSPC for more than `MAX_REGIONS`."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self.regions: Final = tuple(sorted(regions, key=lambda region: region.guest))
        self._starts: Final = [region.guest for region in self.regions]
        self._users: Final = sorted(self.regions, key=lambda region: region.user)
        self._user_starts: Final = [region.user for region in self._users]
        if len(self.regions) > MAX_REGIONS:
            raise MdevError(errno.ENOSPC, f"the client shares {len(self.regions)} regions, {MAX_REGIONS} are the most")
        for first, second in zip(self.regions, self.regions[1:], strict=False):
            if first.guest + first.size > second.guest:
                raise MdevError(errno.EEXIST, f"{second} overlaps {first}")
        for first, second in zip(self._users, self._users[1:], strict=False):
            if first.user + first.size > second.user:
                raise MdevError(errno.EEXIST, f"{second} overlaps {first} at the client's addresses")

    def plus(self, region: Region) -> MemoryTable:
        """Return a table with one more region; errors as the constructor."""
        return MemoryTable((*self.regions, region))

    def minus(self, guest: int, size: int, user: int | None = None) -> MemoryTable:
        """Return a table without the region that has exactly these addresses, else ENOENT."""
        rest = [r for r in self.regions if (r.guest, r.size) != (guest, size) or user not in (None, r.user)]
        if len(rest) == len(self.regions):
            raise MdevError(errno.ENOENT, f"there is no guest memory region of {size:#x} bytes at {guest:#x}")
        return MemoryTable(rest)

    def find(self, guest: int) -> Region | None:
        """Return the region an address is in; O(log n)."""
        index = bisect_right(self._starts, guest) - 1
        if index < 0 or guest - self._starts[index] >= self.regions[index].size:
            return None
        return self.regions[index]

    def pieces(self, guest: int, length: int) -> Iterator[Piece]:
        """Cut a range at the borders of regions; EFAULT at the first byte that is in none."""
        while length:
            region = self.find(guest)
            if region is None:
                raise MdevError(errno.EFAULT, f"guest address {guest:#x} is outside the memory the driver has shared")
            offset = guest - region.guest
            part = min(length, region.size - offset)
            yield Piece(guest, region.host + offset, part)
            guest += part
            length -= part

    def contiguous(self, address: int, length: int, *, user: bool = False) -> Piece:
        """Return the one piece a range is, by guest address or by the frontend's; EFAULT if it is not in one region."""
        if user:
            index = bisect_right(self._user_starts, address) - 1
            region = self._users[index] if index >= 0 else None
            offset = address - region.user if region else 0
        else:
            region = self.find(address)
            offset = address - region.guest if region else 0
        if region is None or offset + length > region.size:
            kind = "frontend" if user else "guest"
            raise MdevError(errno.EFAULT, f"{length} bytes at {kind} address {address:#x} are not in one shared region")
        return Piece(region.guest + offset, region.host + offset, length)


class DirtyLog:
    """A dirty log (vhost-user, SET_LOG_BASE): one bit per 4 KiB page of guest memory, in a file of the frontend's."""

    def __init__(self, fd: int, size: int, offset: int = 0) -> None:
        if size <= 0 or offset < 0 or offset + size >= 1 << 63:
            raise MdevError(errno.EINVAL, f"a dirty log of {size} bytes at offset {offset} is not possible")
        self._mapping: Final = Mapping(fd, size, offset)
        self.host: Final = self._mapping.host
        self.size: Final = size
        #: For engines without an atomic OR: several queue pairs share a log, and each has a thread.
        self.lock: Final = threading.Lock()


def check_total(sizes: Iterable[int]) -> None:
    """Refuse to map more than `MAX_MAPPED` bytes for one client: ENOSPC. Before a `Region` or `DirtyLog` is made, which maps."""
    total = sum(sizes)
    if total > MAX_MAPPED:
        raise MdevError(errno.ENOSPC, f"the client shares {total:#x} bytes, {MAX_MAPPED:#x} are the most")


def _check_file(fd: int, end: int) -> None:
    """Refuse a file that may not serve as guest memory.

    Only memfd, tmpfs and hugetlbfs files have seals (mm/memfd.c, memfd_file_seals_ptr), so asking for them tells. Others could
    hang us on a page fault, as a FUSE file does.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise MdevError(errno.ENOTSUP, f"guest memory must be a memfd, tmpfs or hugetlbfs file, not {link_of(fd)}") from None
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise MdevError(errno.EACCES, f"guest memory {link_of(fd)} is not open for reading and writing")
    size = os.fstat(fd).st_size
    if size < end:
        raise MdevError(errno.EINVAL, f"guest memory {link_of(fd)} has {size} bytes, the region ends at {end}")


def link_of(fd: int) -> str:
    """Return what a descriptor is of, as the kernel names it: a path, ``/memfd:name (deleted)``, ``anon_inode:[eventfd]``."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"descriptor {fd}"
