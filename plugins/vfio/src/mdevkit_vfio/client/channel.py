"""The client's end of a connection: requests, their replies, and what the server asks in between.

Several threads may have requests under way. Whichever of them waits first reads for all, so a single-threaded user has no
thread switch in a round trip. Where the server may ask at any time (DMA by message), `listen` adds two threads: one reads
while nobody else does, one answers. They are two because an answer may block in the socket until the server has read it,
and the server may be unable to read before we have.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_vfio import proto
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.framing import FramingError, Inbox, Received
from mdevkit_vfio.link import NO_SIGNAL

#: Seconds a read waits before whoever reads looks at the clock.
_TICK: Final = 0.1


@dataclass(frozen=True)
class Reply:
    """A reply as it came. Whoever gets it owns the descriptors."""

    id: int
    command: int
    flags: int
    #: The errno of an error reply; 0 otherwise.
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is no error reply."""
        return not self.flags & proto.ERROR


#: A command of the server's, answered with a payload; an OSError becomes an error reply.
Answer = Callable[[int, bytes], bytes]


class Channel:
    """Requests on `sock`, which it owns. `timeout` in seconds for each reply. Any thread may call in."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(_TICK * 1e6)))
        self._sock: Final = sock
        self._timeout: Final = timeout
        self._inbox: Final = Inbox(sock)
        self._send_lock: Final = threading.Lock()
        self._ids: Final = itertools.count()
        # Guards what follows, and is notified when any of it changes.
        self._changed: Final = threading.Condition()
        self._waiting: Final[set[int]] = set()
        self._replies: Final[dict[int, Reply]] = {}
        self._reading = False
        self._broken: MdevError | None = None
        self._answer: Answer | None = None
        self._questions: Final[SimpleQueue[Reply | None]] = SimpleQueue()
        self._threads: Final[list[threading.Thread]] = []

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> Reply:
        """Send a command and return its reply, an error reply too.

        ENOTCONN if the server goes away, ETIMEDOUT if it does not answer, EPROTO if it sends nonsense.
        """
        ident = self._enter()
        try:
            self._send(proto.message(ident, command, payload, flags), fds)
            return self._await(ident)
        finally:
            with self._changed:
                self._waiting.discard(ident)
                # Come after the time-out: it is nobody's, least of all that of the next request with this id.
                late = self._replies.pop(ident, None)
            if late is not None:
                close_all(late.fds)

    def post(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a command that wants no reply."""
        self._send(proto.message(next(self._ids) & 0xFFFF, command, payload, proto.NO_REPLY), fds)

    def listen(self, answer: Answer) -> None:
        """Let `answer` deal with the server's commands, on a thread of its own, from now on."""
        with self._changed:
            self._answer = answer
            if self._threads:
                return
            self._threads.append(threading.Thread(target=self._read_on, name="vfio-user client reader", daemon=True))
            self._threads.append(threading.Thread(target=self._answer_all, name="vfio-user client answers", daemon=True))
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """End the connection and the threads; whoever waits gets ENOTCONN."""
        self._break(MdevError(errno.ENOTCONN, "the connection is closed"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._inbox.close()
        self._sock.close()
        with self._changed:
            for reply in self._replies.values():
                close_all(reply.fds)
            self._replies.clear()

    # -- sending ----------------------------------------------------------------------------------------------------

    def _enter(self) -> int:
        with self._changed:
            if self._broken is not None:
                raise self._broken
            ident = next(i for n in self._ids if (i := n & 0xFFFF) not in self._waiting)
            self._waiting.add(ident)
            return ident

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            with self._send_lock:
                sent = socket.send_fds(self._sock, [data], list(fds), NO_SIGNAL) if fds else 0
                self._sock.sendall(data[sent:], NO_SIGNAL)
        except OSError as error:
            # The reader may know better why: what the server sent before it closed is still to be read.
            raise MdevError(errno.ENOTCONN, f"the server is gone: {error.strerror}") from error

    # -- receiving --------------------------------------------------------------------------------------------------

    def _await(self, ident: int) -> Reply:
        deadline = time.monotonic() + self._timeout
        while True:
            with self._changed:
                if ident in self._replies:
                    return self._replies.pop(ident)
                if self._broken is not None:
                    raise self._broken
                if time.monotonic() > deadline:
                    raise MdevError(errno.ETIMEDOUT, f"no reply within {self._timeout:g} s")
            self._read_or_wait()

    def _read_or_wait(self) -> None:
        """Read one message for everybody; or wait until somebody else has."""
        with self._changed:
            if self._reading:
                self._changed.wait(_TICK)
                return
            self._reading = True
        try:
            self._read()
        finally:
            with self._changed:
                self._reading = False
                self._changed.notify_all()

    def _read(self) -> None:
        try:
            message = self._inbox.pop()
            if message is None:
                # EAGAIN is the end of a tick.
                with contextlib.suppress(BlockingIOError):
                    self._inbox.receive()
                message = self._inbox.pop()
            if message is not None:
                self._dispatch(message)
        except FramingError as error:
            self._break(MdevError(errno.EPROTO, f"the server sent nonsense: {error}"))
        except OSError as error:
            self._break(MdevError(errno.ENOTCONN, f"the server is gone: {error.strerror}"))

    def _dispatch(self, message: Received) -> None:
        reply = Reply(message.id, message.command, message.flags, message.error, bytes(message.payload), tuple(message.fds))
        if message.flags & proto.TYPE_MASK == proto.TYPE_COMMAND:
            self._questions.put(reply)
            return
        with self._changed:
            if message.id in self._waiting and message.id not in self._replies:
                self._replies[message.id] = reply
                return
        # Late, or never asked for.
        close_all(reply.fds)

    def _break(self, error: MdevError) -> None:
        with self._changed:
            if self._broken is None:
                self._broken = error
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._questions.put(None)

    # -- the server's questions -------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        while self._broken is None:
            self._read_or_wait()

    def _answer_all(self) -> None:
        while (question := self._questions.get()) is not None:
            close_all(question.fds)
            with contextlib.suppress(MdevError):
                self._send(self._answer_to(question))

    def _answer_to(self, question: Reply) -> bytes:
        answer = self._answer
        assert answer is not None
        try:
            return proto.reply(question.id, question.command, answer(question.command, question.payload))
        except OSError as error:
            return proto.error_reply(question.id, question.command, error.errno or errno.EIO)
