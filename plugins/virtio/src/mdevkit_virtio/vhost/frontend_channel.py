"""The frontend's end of a vhost-user connection: messages out, replies in, every byte under a time limit.

`VhostUserFrontend` speaks through a `Channel`; tests that want to send what no frontend would (half a message, a wrong size,
a descriptor too many) use its `send` directly. One thread at a time uses a channel.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

from mdevkit_virtio.vhost import proto

_FD_SIZE: Final = array.array("i").itemsize
#: Room for the descriptors of one message; more than `MAX_MSG_FDS` from a backend are cut off by the kernel, and closed.
_CONTROL: Final = socket.CMSG_SPACE(proto.MAX_MSG_FDS * _FD_SIZE)


class Message(NamedTuple):
    """A message as it came. Whoever gets it owns the descriptors."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)


class Channel:
    """A connected socket, which it owns. `timeout` in seconds for each message, both ways."""

    def __init__(self, sock: socket.socket, timeout: float = 10.0) -> None:
        sock.settimeout(timeout)
        self._sock: Final = sock
        self._timeout: Final = timeout
        #: Bytes sent so far.
        self.bytes_sent = 0

    @classmethod
    def connect(cls, path: str | Path, timeout: float = 10.0) -> Channel:
        """Connect to a backend that listens: ENOENT and ECONNREFUSED if none does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Not settimeout: that would not wait where too many others are waiting to be accepted.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6)))
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise MdevError(error.errno or errno.ETIMEDOUT, f"no vhost-user backend at {path}: {error}", path) from error
        return cls(sock, timeout)

    @classmethod
    def pair(cls, timeout: float = 10.0) -> tuple[Channel, int]:
        """Return a channel and the descriptor of its other end, which is the caller's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours, timeout), theirs.detach()

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    def send(self, data: proto.Buffer, fds: Sequence[int] = ()) -> None:
        """Send bytes, well-formed or not; the descriptors go with the first one. ENOTCONN if the backend is gone."""
        try:
            sent = socket.send_fds(self._sock, [data], fds, socket.MSG_NOSIGNAL) if fds else 0
            self._sock.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError as error:
            raise self._late("read") from error
        except OSError as error:
            raise MdevError(errno.ENOTCONN, f"the backend is gone: {error.strerror}") from error
        self.bytes_sent += len(data)

    def receive(self) -> Message:
        """Return the next message. ENOTCONN if the backend closes, ETIMEDOUT if it is silent, EPROTO for what is no message."""
        fds: list[int] = []
        try:
            header = proto.Header(*proto.HEADER.unpack(self._read(proto.HEADER_SIZE, fds)))
            if header.size > proto.MAX_PAYLOAD or header.flags & proto.VERSION_MASK != proto.VERSION:
                raise MdevError(errno.EPROTO, f"the backend sent no message of version {proto.VERSION}: {header}")
            return Message(header.request, header.flags, self._read(header.size, fds), tuple(fds))
        except MdevError:
            for fd in fds:
                os.close(fd)
            raise

    def closed_by_backend(self) -> bool:
        """Wait for the backend to close the connection; false if it has not within the timeout. What it still sends is dropped."""
        try:
            while self._sock.recv(4096):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        """Vanish, as a frontend that was killed does. Closing twice is harmless."""
        self._sock.close()

    def shutdown(self) -> None:
        """Send no more, but go on reading."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def _read(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            part = self._receive(size - len(data), fds)
            if not part:
                raise MdevError(errno.ENOTCONN, "the backend has closed the connection")
            data += part
        return data

    def _receive(self, size: int, fds: list[int]) -> bytes:
        try:
            data, control, _, _ = self._sock.recvmsg(size, _CONTROL, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError as error:
            raise self._late("answer") from error
        except OSError as error:
            raise MdevError(errno.ENOTCONN, f"the backend is gone: {error.strerror}") from error
        for level, kind, content in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += array.array("i", content[: len(content) - len(content) % _FD_SIZE])
        return data

    def _late(self, what: str) -> MdevError:
        return MdevError(errno.ETIMEDOUT, f"the backend did not {what} within {self._timeout:g} s")
