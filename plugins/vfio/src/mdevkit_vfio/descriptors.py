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

    ENOTSUP for a file outside memfd, tmpfs and hugetlbfs. EACCES for a file opened without the rights the map grants. EINVAL
    for one that is too short; it may still be cut later, which `mdevkit_vfio.dma` survives.
    """
    if not is_memory(fd):
        raise MdevError(errno.ENOTSUP, f"guest memory must be a memfd, tmpfs or hugetlbfs file, not {_link(fd)}")
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if (readable and mode == os.O_WRONLY) or (writable and mode == os.O_RDONLY):
        raise MdevError(errno.EACCES, f"guest memory {_link(fd)} is not open for what its map allows")
    size = os.fstat(fd).st_size
    if size < end:
        raise MdevError(errno.EINVAL, f"guest memory {_link(fd)} has {size} bytes, the map ends at {end}")


def is_memory(fd: int) -> bool:
    """Whether a file is a memfd, or on tmpfs or hugetlbfs: only those have seals (mm/memfd.c, memfd_file_seals_ptr)."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def take_over(fd: int, *, writable: bool) -> bool:
    """Put an open file description of our own behind `fd`; False where that is denied, and then nothing has changed.

    The one that came is shared with the client, who may have it append (F_SETFL) whenever it likes. Ours has the rights of the
    client's, or fewer: it cannot write unless `writable`. Only for what `is_memory`: opening other files may block or do more.
    """
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == os.O_RDWR and not writable:
        mode = os.O_RDONLY
    try:
        # O_NONBLOCK, or a client with a lease on its file (F_SETLEASE) would have us wait for 45 s.
        own = os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.dup2(own, fd, inheritable=False)
        finally:
            os.close(own)
    except OSError:
        return False
    return True


def check_no_append(fd: int) -> None:
    """Refuse a file that is open for appending: pwrite(2) writes to its end, wherever it is told to write. EINVAL."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        raise MdevError(errno.EINVAL, f"guest memory {_link(fd)} is open for appending (O_APPEND), and cannot be opened again")


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
