"""Memory files a client may map: memfds sealed against resizing.

A file handed to an untrusted client must never shrink under our own mapping of it (a load would raise SIGBUS) and must
never grow on our account. memfd seals (fcntl(2), F_ADD_SEALS) make both impossible, which is why the mapping returned
here is safe to touch directly, unlike memory that comes *from* a client (see `mdevkit_vfio.dma`). Any thread may call in.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

from mdevkit.errors import MdevError

#: What every file of ours carries: no growing, no shrinking, no further seals (so F_SEAL_WRITE cannot be added either).
SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def sealed_memfd(name: str, size: int) -> int:
    """Return a new close-on-exec memfd of `size` zero bytes that nobody can resize; the caller owns it.

    `name` is shown in /proc/PID/fd. Raises `MdevError` with the system's errno (ENOMEM, EMFILE).
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        raise _no_memory(error, name, size) from error
    return fd


def _no_memory(error: OSError, name: str, size: int) -> MdevError:
    number = error.errno or errno.ENOMEM
    return MdevError(number, f"cannot allocate {size} bytes of memory for {name}: {os.strerror(number)}")


class SealedMemory:
    """One sealed memfd and our mapping of it; `fd` stays valid until `close`. Raises as `sealed_memfd`."""

    def __init__(self, name: str, size: int, fd: int = -1) -> None:
        self.size: Final = size
        self.fd: Final = sealed_memfd(name, size) if fd < 0 else fd
        try:
            self.map: Final = mmap.mmap(self.fd, size)
        except OSError as error:
            os.close(self.fd)
            raise _no_memory(error, name, size) from error
        self._closed = False

    @classmethod
    def over(cls, fd: int, size: int) -> SealedMemory:
        """Take over a memfd that `sealed_memfd` made, in another process; EINVAL for another size. Closed if this raises."""
        found = os.fstat(fd).st_size
        if found != size:
            os.close(fd)
            raise MdevError(errno.EINVAL, f"a file of {found} bytes cannot be the memory of {size} bytes")
        return cls("adopted", size, fd)

    def close(self) -> None:
        """Close the descriptor; the mapping itself lives until the last user drops it. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            os.close(self.fd)
