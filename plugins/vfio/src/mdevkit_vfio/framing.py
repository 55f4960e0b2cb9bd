"""From a byte stream with descriptors in it to whole messages.

A UNIX stream socket neither keeps messages apart nor says which of the bytes of one receive a descriptor came with. One
`Inbox` per connection does the first for messages cut or glued at any byte, and the second by what the kernel promises:
a receive never goes on past the data that carried descriptors (unix_stream_read_generic in net/unix/af_unix.c), and
descriptors travel with a message's first byte, so they belong to the last message that begins in what has arrived.

Only the thread that receives for the connection may call in.
"""

from __future__ import annotations

import array
import errno
import socket
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.proto import HEADER, HEADER_SIZE, MAX_MESSAGE_SIZE, MAX_MSG_FDS

#: Bytes taken with one receive; a larger message gets a buffer of its own for as long as it lives.
CAPACITY: Final = 1 << 16
#: Room for the descriptors of one receive. The kernel drops what does not fit and says so.
ANCILLARY: Final = socket.CMSG_SPACE(MAX_MSG_FDS * array.array("i").itemsize)
RECEIVE_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC)

_NO_FDS: Final[list[int]] = []

#: What ``recvmsg`` returns as ancillary data.
Ancillary = list[tuple[int, int, bytes]]


class PeerGoneError(ConnectionError):
    """The other end closed the connection, perhaps in the middle of a message."""

    def __init__(self) -> None:
        super().__init__(errno.ENOTCONN, "the peer closed the connection")


class FramingError(MdevError):
    """A header whose size cannot be right: where the next message begins is unknown. `id` and `command` are its own."""

    def __init__(self, ident: int, command: int, size: int) -> None:
        super().__init__(errno.EINVAL, f"a message of {size} bytes is outside {HEADER_SIZE} to {MAX_MESSAGE_SIZE}")
        self.id = ident
        self.command = command


class Received(NamedTuple):
    """One message. `payload` is valid until the next receive; whoever gets it owns the descriptors in `fds`.

    `complete` is false if there were more descriptors than a message may carry, some of which the kernel has dropped.
    """

    id: int
    command: int
    flags: int
    error: int
    payload: memoryview
    fds: list[int]
    complete: bool


class Inbox:
    """The receiving side of `sock`, a stream socket that blocks, perhaps with a time-out of the kernel's (SO_RCVTIMEO)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        #: Where data arrives; a caller may receive into all of it while `empty`, and then calls `added`.
        self.buffer: Final = bytearray(CAPACITY)
        self.view: Final = memoryview(self.buffer)
        self._start = 0
        self._end = 0
        #: A message that does not fit the buffer, and how much of it is there.
        self._large: memoryview | None = None
        self._large_have = 0
        #: Descriptors by where their message begins in the buffer; None where there were too many and they are closed.
        self._fds: dict[int, list[int] | None] = {}

    def empty(self) -> bool:
        """Return whether all that was received has been taken."""
        return self._start == self._end and self._large is None

    def receive(self) -> None:
        """Wait for data. Raises `PeerGoneError` at the end of the stream, OSError if the connection breaks."""
        if self._large is not None:
            self._receive_large(self._large)
            return
        if self._start:
            self._compact()
        count, ancillary, flags, _ = self._sock.recvmsg_into([self.view[self._end :]], ANCILLARY, RECEIVE_FLAGS)
        if not count:
            raise PeerGoneError
        self.added(count, ancillary, flags)

    def added(self, count: int, ancillary: Ancillary, flags: int) -> None:
        """Count in `count` bytes that were received behind what is there, with what came along."""
        self._end += count
        if ancillary or flags & socket.MSG_CTRUNC:
            self._keep(self._last_start(), ancillary, flags)

    def pop(self) -> Received | None:
        """Return the next message, or None until more is received. Raises `FramingError` for an impossible size."""
        if self._large is not None:
            return self._pop_large(self._large)
        have = self._end - self._start
        if have < HEADER_SIZE:
            return None
        ident, command, size, flags, error = HEADER.unpack_from(self.buffer, self._start)
        if not HEADER_SIZE <= size <= MAX_MESSAGE_SIZE:
            raise FramingError(ident, command, size)
        if size > have:
            if size > CAPACITY:
                self._begin_large(size)
            return None
        fds = self._fds.pop(self._start, _NO_FDS) if self._fds else []
        payload = self.view[self._start + HEADER_SIZE : self._start + size]
        self._start += size
        if self._start == self._end:
            # The next receive, here or by a caller that sees `empty`, fills the buffer from its beginning.
            self._start = self._end = 0
        return Received(ident, command, flags, error, payload, list(fds or ()), fds is not None)

    def close(self) -> None:
        """Close the descriptors nobody took."""
        for fds in self._fds.values():
            close_all(fds or ())
        self._fds.clear()

    def _begin_large(self, size: int) -> None:
        """Give the message at `_start`, the last one there, a buffer that ends where it ends."""
        self._compact()
        self._large = memoryview(bytearray(size))
        self._large_have = self._end
        self._large[: self._end] = self.view[: self._end]
        self._end = 0

    def _receive_large(self, large: memoryview) -> None:
        count, ancillary, flags, _ = self._sock.recvmsg_into([large[self._large_have :]], ANCILLARY, RECEIVE_FLAGS)
        if not count:
            raise PeerGoneError
        self._large_have += count
        if ancillary or flags & socket.MSG_CTRUNC:
            self._keep(0, ancillary, flags)

    def _pop_large(self, large: memoryview) -> Received | None:
        if self._large_have < len(large):
            return None
        self._large = None
        ident, command, _, flags, error = HEADER.unpack_from(large)
        fds = self._fds.pop(0, _NO_FDS)
        return Received(ident, command, flags, error, large[HEADER_SIZE:], list(fds or ()), fds is not None)

    def _keep(self, start: int, ancillary: Ancillary, flags: int) -> None:
        """Add descriptors to those of the message at `start`; if it has more than it may, none is kept."""
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        before = self._fds.get(start, _NO_FDS)
        if before is None or flags & socket.MSG_CTRUNC or len(before) + len(fds) > MAX_MSG_FDS:
            close_all((*(before or ()), *fds))
            self._fds[start] = None
        else:
            self._fds[start] = [*before, *fds]

    def _last_start(self) -> int:
        """Return where the last message begins, whole or not."""
        at = self._start
        while self._end - at >= HEADER_SIZE:
            size = HEADER.unpack_from(self.buffer, at)[2]
            if size < HEADER_SIZE or at + size >= self._end:
                break
            at += size
        return at

    def _compact(self) -> None:
        """Move what is left to the front, so that every message that fits the buffer fits behind it."""
        left = self._end - self._start
        self.buffer[:left] = self.buffer[self._start : self._end]
        self._fds = {at - self._start: fds for at, fds in self._fds.items()}
        self._start, self._end = 0, left
