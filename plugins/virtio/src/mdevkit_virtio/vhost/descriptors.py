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
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.memory import link_of

_EVENTFD: Final = "anon_inode:[eventfd]"


def check_eventfd(fd: int) -> None:
    """Refuse anything but an eventfd: EINVAL. The kernel names it in /proc/self/fd, which no file can imitate."""
    kind = link_of(fd)
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
        raise MdevError(errno.EINVAL, f"the descriptor for the backend's requests is not a UNIX stream socket but {link_of(fd)}")
    return sock


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor but -1; errors of a client's exotic file are nobody's business here."""
    for fd in fds:
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
