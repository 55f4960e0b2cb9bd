"""Frames between the service and its own processes: a length, and JSON. Descriptors travel with a frame's first byte.

`send` and `Reader` block and are for hosts and the zygote; `Channel` is for the service's event loop. A frame that carries
descriptors says how many (`fds`), since a read may deliver them together with the tail of an earlier frame.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
from mdevkit.errors import MdevError

_HEAD: Final = struct.Struct("<I")
#: The largest frame in bytes: a list of 100,000 devices fits.
LIMIT: Final = 1 << 27
#: The most descriptors of one read.
_MAX_FDS: Final = 16
_CHUNK: Final = 1 << 18

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode

Message = dict[str, Any]


def frame(message: Message) -> bytes:
    """Return the bytes of a message."""
    body = _encode(message)
    return _HEAD.pack(len(body)) + body


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send a message on a blocking socket; the caller keeps others from sending meanwhile. OSError when nobody listens."""
    data = frame({**message, "fds": len(fds)} if fds else message)
    sent = socket.send_fds(sock, [data], fds) if fds else sock.send(data)
    if sent < len(data):
        sock.sendall(data[sent:])


class Frames:
    """Cuts what was read into messages, and gives each its descriptors."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Iterator[tuple[Message, list[int]]]:
        """Yield the messages that are complete with `data`; EPROTO for what is not a frame."""
        self._bytes += data
        self._fds.extend(fds)
        while len(self._bytes) >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._bytes)
            if size > LIMIT:
                raise MdevError(errno.EPROTO, f"a frame of {size} bytes is too long")
            end = _HEAD.size + size
            if len(self._bytes) < end:
                return
            message = self._message(bytes(memoryview(self._bytes)[_HEAD.size : end]))
            del self._bytes[:end]
            yield message, [self._fds.popleft() for _ in range(min(message.get("fds", 0), len(self._fds)))]

    @staticmethod
    def _message(body: bytes) -> Message:
        try:
            message = _decode(body)
        except msgspec.DecodeError as error:
            raise MdevError(errno.EPROTO, f"a frame is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise MdevError(errno.EPROTO, "a frame is not an object")
        return message

    def close(self) -> None:
        """Close descriptors nobody has taken."""
        while self._fds:
            os.close(self._fds.popleft())


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Read what is there, with descriptors that no program started later inherits; empty at the end of the stream."""
    room = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


class Reader:
    """Reads messages from a blocking socket, on one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._frames: Final = Frames()

    def __iter__(self) -> Iterator[tuple[Message, list[int]]]:
        """Yield messages with their descriptors until the other side ends; EPROTO for a broken stream."""
        try:
            while True:
                try:
                    data, fds = receive(self._sock)
                except ConnectionResetError:
                    return
                if not data:
                    return
                yield from self._frames.feed(data, fds)
        finally:
            self._frames.close()


class Channel:
    """The same on the event loop: `received` is called for each message, `closed` once, when the stream has ended.

    Takes the socket over. Everything here runs on the loop's thread.
    """

    def __init__(self, sock: socket.socket, received: Callable[[Message, list[int]], None], closed: Callable[[], None]) -> None:
        self._loop: Final = asyncio.get_running_loop()
        self._sock: Final = sock
        self._frames: Final = Frames()
        self._received: Final = received
        self._closed: Final = closed
        self._queue: Final[deque[tuple[memoryview, list[int]]]] = deque()
        self.open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message as soon as there is room. Descriptors are duplicated where they have to wait."""
        if not self.open:
            raise MdevError(errno.ECONNRESET, "the process has ended")
        data = memoryview(frame({**message, "fds": len(fds)} if fds else message))
        idle = not self._queue
        self._queue.append((data, [os.dup(fd) for fd in fds]))
        if idle:
            self._writable()

    def close(self) -> None:
        """Close the stream; `closed` is not called for it."""
        if self.open:
            self.open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._frames.close()
            self._drop_queue()
            self._sock.close()

    def _writable(self) -> None:
        try:
            while self._queue:
                data, fds = self._queue[0]
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
                _close_all(fds)
                if sent == len(data):
                    self._queue.popleft()
                else:
                    self._queue[0] = (data[sent:], [])
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._writable)
            return
        except OSError:
            # Whatever the other side has sent before it ended is still read; then the stream ends there too.
            self._drop_queue()
        self._loop.remove_writer(self._sock)

    def _drop_queue(self) -> None:
        while self._queue:
            _close_all(self._queue.popleft()[1])

    def _readable(self) -> None:
        try:
            data, fds = receive(self._sock)
            if data:
                for message, own in self._frames.feed(data, fds):
                    self._received(message, own)
                    if not self.open:
                        return
                return
        except BlockingIOError:
            return
        except OSError:
            # Reset by a peer that died with unread data, or EPROTO: either way this stream has ended.
            pass
        self.close()
        self._closed()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
