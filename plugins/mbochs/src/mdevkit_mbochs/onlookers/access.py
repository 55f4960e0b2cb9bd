"""Who may look through VNC: where it listens, and the password. On the thread that sets an attribute."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.sockets import Listen

from mdevkit_mbochs.attributes import TCP, UNIX, parse_tcp

_LONGEST: Final = 4096


def check(vnc: str, password_file: str, insecure: bool) -> None:
    """Raise EINVAL for a TCP port that everybody could look through, and what `read_password` raises."""
    if password_file:
        read_password(password_file)
    elif vnc.startswith(TCP) and not insecure:
        message = (
            f"vnc={vnc} lets every user of this machine look: it needs vnc_password_file=PATH, or vnc_insecure=yes; "
            f"vnc={UNIX}PATH is yours alone"
        )
        raise MdevError(errno.EINVAL, message)


def listen(vnc: str, listen_at: Listen) -> socket.socket:
    """Return a listening socket for ``unix:PATH``, made by `listen_at`, or ``tcp:[ADDRESS:]PORT``; EADDRINUSE and the like."""
    if vnc.startswith(UNIX):
        return listen_at(vnc.removeprefix(UNIX))
    address, port = parse_tcp(vnc.removeprefix(TCP))
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise MdevError(error.errno or errno.EIO, f"VNC cannot listen at {vnc}: {error.strerror}", vnc) from error
    return listener


def read_password(path: str) -> bytes:
    """Return the first line of a file; MdevError says what is wrong with it.

    The file must belong to the user this process runs as, and nobody else may have any right to it: EPERM.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"the password file {path} cannot be read: {error.strerror}", path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            message = (
                f"the password file {path} must be a file of the user who serves the display, and nobody else's business (0600)"
            )
            raise MdevError(errno.EPERM, message, path)
        password = os.read(fd, _LONGEST).partition(b"\n")[0].rstrip(b"\r")
    finally:
        os.close(fd)
    if not password:
        raise MdevError(errno.EINVAL, f"the password file {path} begins with an empty line", path)
    return password
