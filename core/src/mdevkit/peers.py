"""Who is at the other end of a UNIX socket, as the kernel noted it then (SO_PEERCRED, unix(7)). Any thread may call.

Without `typing` and `pathlib`: commands that ask the service would start a third slower.
"""

from __future__ import annotations

import socket
import sys


class Client:
    """Who uses a device, for messages; `name` is its program's as ps tells it, empty if it had ended by then."""

    __slots__ = ("name", "pid", "uid")

    def __init__(self, pid: int, uid: int, name: str = "") -> None:
        self.pid = pid
        self.uid = uid
        self.name = name

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})" if self.name else f"pid {self.pid}"


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of whoever connected, or of whoever listens where `sock` connected to; OSError for other sockets."""
    ucred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = (int.from_bytes(ucred[at : at + 4], sys.byteorder) for at in (0, 4, 8))
    return pid, uid, gid


def client_of(sock: socket.socket) -> Client:
    """Return who is at the other end, by name; OSError as `credentials`."""
    pid, uid, _ = credentials(sock)
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:  # noqa: PTH123  (see above)
            return Client(pid, uid, file.read().strip())
    except OSError:
        return Client(pid, uid)
