"""Everything between a connection and a client: accepting, and hearing the first message.

Whoever connects must say VERSION before it counts as a client: somebody who connects and stays silent, or talks nonsense,
keeps nobody else from the device. Nothing here ever waits for a peer, and not a byte behind that first message is taken,
since descriptors that come with it would be lost. Used on the thread of one server alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import select
import socket
import time
from collections.abc import Container
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

from mdevkit_vfio import proto
from mdevkit_vfio.proto import Command, Header

log = logging.getLogger("mdevkit.vfio")

#: Seconds a newcomer has to say VERSION, and to wait for a predecessor that is on its way out.
PATIENCE: Final = 5.0
#: The longest VERSION taken, in bytes; QEMU's has about 300.
MAX_HELLO: Final = 1 << 14
#: Connections heard out at the same time; beyond it the one that has been silent longest has to go.
MAX_NEWCOMERS: Final = 32
#: Seconds without accepting after somebody was refused: connecting in a loop must not cost the other devices their rate.
REFUSAL_PAUSE: Final = 0.001
#: Seconds without accepting after the process has run out of descriptors.
SHORTAGE_PAUSE: Final = 0.1


class Hello(NamedTuple):
    """A client's VERSION, parsed and acceptable."""

    id: int
    version: proto.Version


class Newcomer:
    """A connection that is no client yet."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock: Final = sock
        self.deadline: Final = time.monotonic() + PATIENCE
        #: The first message, once it is there and good.
        self.hello: Hello | None = None
        self._data = bytearray()
        self._clean = True

    @property
    def message(self) -> bytes:
        """The first message as far as it is there."""
        return bytes(self._data)

    def receive(self) -> None:
        """Take what is there of the first message. Raises MdevError for one that is refused, and at the end."""
        with contextlib.suppress(BlockingIOError):
            while self.hello is None:
                self._receive_some()
                if len(self._data) == self._wanted():
                    self.hello = self._parse()

    def refuse(self, error: MdevError) -> None:
        """Reply with the errno of `error`, as far as there is a message to reply to, and close."""
        if len(self._data) >= proto.HEADER_SIZE:
            header = self._header()
            # A socket that takes no 16 bytes belongs to somebody who is not listening.
            with contextlib.suppress(OSError):
                reply = proto.error_reply(header.id, header.command, error.errno or errno.EIO)
                self.sock.send(reply, socket.MSG_NOSIGNAL)
        self.sock.close()

    def _receive_some(self) -> None:
        try:
            data, _, flags, _ = self.sock.recvmsg(self._wanted() - len(self._data))
        except ConnectionError as error:
            raise MdevError(errno.ENOTCONN, f"the connection broke: {error.strerror}") from error
        if not data:
            raise MdevError(errno.ENOTCONN, "it left without a word")
        # Without room for descriptors the kernel closes them and says so.
        self._clean = self._clean and not flags & socket.MSG_CTRUNC
        self._data += data

    def _wanted(self) -> int:
        if len(self._data) < proto.HEADER_SIZE:
            return proto.HEADER_SIZE
        size = self._header().size
        if not proto.HEADER_SIZE <= size <= MAX_HELLO:
            raise proto.invalid(Command.VERSION, f"a first message of {size} bytes")
        return size

    def _header(self) -> Header:
        return Header(*proto.HEADER.unpack_from(self._data))

    def _parse(self) -> Hello:
        header = self._header()
        if header.command != Command.VERSION or header.flags:
            name = proto.command_name(header.command)
            raise proto.invalid(Command.VERSION, f"the first message is {name} with flags {header.flags:#x}")
        if not self._clean:
            raise proto.invalid(Command.VERSION, "it came with descriptors")
        version = proto.Version.parse(bytes(self._data[proto.HEADER_SIZE :]))
        if version.major != proto.MAJOR:
            raise proto.invalid(Command.VERSION, f"version {version.major}.{version.minor} is not one of ours")
        return Hello(header.id, version)


class Reception:
    """The newcomers of one listening socket. `wake` is an eventfd that ends a wait."""

    def __init__(self, listener: socket.socket, wake: int) -> None:
        self._listener: Final = listener
        self._wake: Final = wake
        self._newcomers: Final[list[Newcomer]] = []
        self._accept_after = 0.0

    @property
    def ready(self) -> list[Newcomer]:
        """Those who have said VERSION, in the order they came."""
        return [newcomer for newcomer in self._newcomers if newcomer.hello is not None]

    def wait(self, attached: int, timeout: float | None) -> None:
        """Wait until something happens, up to `timeout` seconds, and deal with whoever comes and talks.

        `attached` is the connection whose end counts as something, or -1.
        """
        events = dict(self._poll(attached).poll(self.milliseconds(timeout)))
        if self._wake in events:
            os.eventfd_read(self._wake)
        self.attend(events)

    @property
    def watched(self) -> list[int]:
        """The descriptors on which input is to be waited for."""
        fds = [newcomer.sock.fileno() for newcomer in self._newcomers if newcomer.hello is None]
        if time.monotonic() >= self._accept_after:
            fds.append(self._listener.fileno())
        return fds

    @property
    def empty(self) -> bool:
        """Whether nobody is being heard out."""
        return not self._newcomers

    def attend(self, ready: Container[int]) -> None:
        """Deal with whoever comes and talks, as far as their descriptors are `ready`, and with whoever has not."""
        for newcomer in [newcomer for newcomer in self._newcomers if newcomer.sock.fileno() in ready]:
            self._hear(newcomer)
        if self._listener.fileno() in ready:
            self._accept()
        self._dismiss_the_late()

    def admit(self, newcomer: Newcomer) -> socket.socket:
        """Give the connection away, blocking as its new owner wants it."""
        self._newcomers.remove(newcomer)
        newcomer.sock.setblocking(True)
        return newcomer.sock

    def refuse(self, newcomer: Newcomer, error: MdevError) -> None:
        """Send a newcomer away with an error reply to its VERSION."""
        log.info("a client is refused: %s", error)
        self._newcomers.remove(newcomer)
        newcomer.refuse(error)
        self._accept_after = time.monotonic() + REFUSAL_PAUSE

    def close(self) -> None:
        """Send everybody away."""
        for newcomer in list(self._newcomers):
            self.refuse(newcomer, MdevError(errno.ENODEV, "the device is going away"))

    def _poll(self, attached: int) -> select.poll:
        poll = select.poll()
        if attached >= 0:
            poll.register(attached, select.POLLRDHUP)
        for fd in (self._wake, *self.watched):
            poll.register(fd, select.POLLIN)
        return poll

    def milliseconds(self, timeout: float | None) -> int | None:
        """Return how long to poll: until `timeout`, the next deadline or the end of a pause."""
        now = time.monotonic()
        moments = [newcomer.deadline for newcomer in self._newcomers]
        if timeout is not None:
            moments.append(now + timeout)
        if self._accept_after > now:
            moments.append(self._accept_after)
        return max(0, math.ceil((min(moments) - now) * 1000)) if moments else None

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("no client can be accepted: %s", error)
            self._accept_after = time.monotonic() + SHORTAGE_PAUSE
            return
        newcomer = Newcomer(sock)
        self._newcomers.append(newcomer)
        self._hear(newcomer)
        if len(self._newcomers) > MAX_NEWCOMERS:
            self.refuse(self._newcomers[0], MdevError(errno.EAGAIN, "too many connections that say nothing"))

    def _hear(self, newcomer: Newcomer) -> None:
        try:
            newcomer.receive()
        except MdevError as error:
            self.refuse(newcomer, error)

    def _dismiss_the_late(self) -> None:
        now = time.monotonic()
        for newcomer in [newcomer for newcomer in self._newcomers if newcomer.deadline <= now]:
            self.refuse(newcomer, MdevError(errno.ETIMEDOUT, f"no client after {PATIENCE:g} s"))
