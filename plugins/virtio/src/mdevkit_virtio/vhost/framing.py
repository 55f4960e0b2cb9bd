"""From a byte stream with descriptors in it to whole vhost-user messages.

No more is received than the message under way needs, header first, so descriptors always belong to it, whatever the other
end has sent behind it. Nothing here waits. One `Inbox` per connection, used by one thread.
"""

from __future__ import annotations

import array
import errno
import socket
from dataclasses import dataclass, field
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.vhost.descriptors import close_all
from mdevkit_virtio.vhost.proto import HEADER, HEADER_SIZE, MAX_MSG_FDS, MAX_PAYLOAD, VERSION, VERSION_MASK, Header, request_name

_ANCILLARY: Final = socket.CMSG_SPACE(MAX_MSG_FDS * array.array("i").itemsize)
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class PeerGoneError(ConnectionError):
    """The other end closed the connection, perhaps in the middle of a message."""

    def __init__(self) -> None:
        super().__init__(errno.ENOTCONN, "the peer closed the connection")


@dataclass(slots=True)
class Message:
    """One message; whoever gets it owns `fds`. `complete` is false if it had more descriptors than a message may have."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)
    complete: bool = True


class Inbox:
    """The receiving side of `sock`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._data: Final = bytearray()
        self._header: Header | None = None
        self._fds: list[int] = []
        self._complete = True

    def receive(self) -> Message | None:
        """Return the next message, None if it is not there in whole.

        `PeerGoneError` at the end of the stream, other OSErrors if the connection breaks, EPROTO for a header that cannot
        be right: where the next message begins is unknown then.
        """
        try:
            while len(self._data) < self._wanted():
                self._receive_some(self._wanted() - len(self._data))
                if self._header is None and len(self._data) == HEADER_SIZE:
                    self._header = _checked(Header(*HEADER.unpack(self._data)))
        except BlockingIOError:
            return None
        return self._take()

    def close(self) -> None:
        """Close the descriptors nobody took."""
        close_all(self._fds)
        self._fds = []

    def _wanted(self) -> int:
        return HEADER_SIZE + (self._header.size if self._header is not None else 0)

    def _receive_some(self, size: int) -> None:
        data, ancillary, flags, _ = self._sock.recvmsg(size, _ANCILLARY, _FLAGS)
        if ancillary or flags & socket.MSG_CTRUNC:
            self._keep(ancillary, flags)
        if not data:
            raise PeerGoneError
        self._data.extend(data)

    def _keep(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        """Add descriptors to the message's; if it has more than it may, none is kept."""
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_MSG_FDS:
            self._complete = False
        if not self._complete:
            self.close()

    def _take(self) -> Message:
        assert self._header is not None
        message = Message(
            self._header.request, self._header.flags, bytes(self._data[HEADER_SIZE:]), fds=self._fds, complete=self._complete
        )
        self._data.clear()
        self._header, self._fds, self._complete = None, [], True
        return message


def _checked(header: Header) -> Header:
    if header.flags & VERSION_MASK != VERSION:
        raise MdevError(errno.EPROTO, f"{request_name(header.request)}: flags {header.flags:#x} are not those of version {VERSION}")
    if header.size > MAX_PAYLOAD:
        raise MdevError(
            errno.EPROTO, f"{request_name(header.request)}: a payload of {header.size} bytes, {MAX_PAYLOAD} are the most"
        )
    return header
