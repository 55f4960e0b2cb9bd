"""What a descriptor from a client must be before anything of ours touches it. Any thread may call in.

A client is not trusted: an "eventfd" that is a pipe blocks or kills whoever writes it. Memory is checked where it is mapped
(`mdevkit_virtio.memory`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError

_EVENTFD: Final = "anon_inode:[eventfd]"


def check_eventfd(fd: int) -> None:
    """Refuse anything but an eventfd: EINVAL. The kernel names it in /proc/self/fd, which no file can imitate."""
    kind = _link(fd)
    if kind != _EVENTFD:
        raise MdevError(errno.EINVAL, f"the descriptor for a queue is not an eventfd but {kind}")


def take_socket(fd: int) -> socket.socket:
    """Return a UNIX stream socket of a client's, which owns `fd` from now on; EINVAL for anything else."""
    sock = None
    try:
        sock = socket.socket(fileno=fd)
        fits = (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        fits = False
    if sock is None or not fits:
        if sock is not None:
            sock.detach()
        raise MdevError(errno.EINVAL, f"the descriptor for the backend's requests is not a UNIX stream socket but {_link(fd)}")
    return sock


def drain(fd: int) -> None:
    """Empty a client's eventfd; never blocks."""
    with contextlib.suppress(OSError):
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor but -1; errors of a client's exotic file are nobody's business here."""
    for fd in fds:
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _link(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"descriptor {fd}"
