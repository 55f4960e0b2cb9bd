"""What a descriptor from a client must be before anything of ours touches it.

A client is not trusted: a "memory" that lives on a FUSE mount hangs whoever reads it, an "eventfd" that is a pipe blocks
or kills whoever writes it. So each descriptor is checked when it arrives. Any thread may call in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from mdevkit.errors import MdevError

_EVENTFD = "anon_inode:[eventfd]"


def check_eventfd(fd: int) -> None:
    """Refuse anything but an eventfd: EINVAL. The kernel names it in /proc/self/fd, which no file can imitate."""
    kind = _link(fd)
    if kind != _EVENTFD:
        raise MdevError(errno.EINVAL, f"the descriptor for an interrupt is not an eventfd but {kind}")


def check_memory(fd: int, end: int, *, readable: bool, writable: bool) -> None:
    """Refuse a file that may not serve as guest memory up to byte `end`.

    ENOTSUP for a file outside memfd, tmpfs and hugetlbfs: only files of those have seals, so asking for the seals tells
    (mm/memfd.c, memfd_file_seals_ptr). EACCES for a file opened without the rights the map grants. EINVAL for one that
    is too short; it may still be cut later, which `mdevkit_vfio.dma` survives.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise MdevError(errno.ENOTSUP, f"guest memory must be a memfd, tmpfs or hugetlbfs file, not {_link(fd)}") from None
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if (readable and mode == os.O_WRONLY) or (writable and mode == os.O_RDONLY):
        raise MdevError(errno.EACCES, f"guest memory {_link(fd)} is not open for what its map allows")
    size = os.fstat(fd).st_size
    if size < end:
        raise MdevError(errno.EINVAL, f"guest memory {_link(fd)} has {size} bytes, the map ends at {end}")


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor; errors of a client's exotic file are nobody's business here."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _link(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"descriptor {fd}"
