"""The sending side of a connection, and the questions the device asks its client.

Two kinds of thread send on one socket: the connection's own sends replies, and any other may send DMA messages. DMA by
message is a question to the client whose answer arrives on the connection's thread; the thread that asks sleeps until
`Link.deliver` wakes it.

What keeps the messages whole: the kernel takes a send of up to `WHOLE` bytes into a stream socket's queue in one piece
(one buffer, unix_stream_sendmsg in net/unix/af_unix.c). Questions are no longer than that. Longer replies are sent under a
lock, and so are questions; a short reply needs none, which is a microsecond of a register read's ten.

Threads: `send`, `deliver` and `hang_up` from the connection's; `dma_read` and `dma_write` from any other (EDEADLK).
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
from collections.abc import Sequence
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_vfio import proto
from mdevkit_vfio.framing import Received
from mdevkit_vfio.proto import Command

#: The longest message that enters the socket's queue as a whole, in bytes.
WHOLE: Final = 1 << 15
#: How long a client may take to answer a DMA message, in seconds; QEMU gives us as long.
DMA_TIMEOUT: Final = 5.0
#: The most data of one DMA message.
DMA_CHUNK: Final = WHOLE - proto.HEADER_SIZE - 16
#: No SIGPIPE, whatever the process does with it. (The enum member would cost a conversion with each send.)
NO_SIGNAL: Final = int(socket.MSG_NOSIGNAL)
_MORE: Final = int(socket.MSG_MORE)
#: How many questions given up on are remembered, so that their late answers are no surprise.
_REMEMBERED: Final = 64


class _Question:
    """A DMA message under way."""

    def __init__(self, command: Command, iova: int, count: int) -> None:
        self.command: Final = command
        self.iova: Final = iova
        self.count: Final = count
        self.done: Final = threading.Event()
        self.moved = 0
        self.data = b""
        self.error: MdevError | None = None

    def answer(self, message: Received) -> None:
        """Take the reply; one that does not fit the question is EPROTO for whoever asked."""
        try:
            self._read(message)
        except MdevError as error:
            self.error = error
        self.done.set()

    def _read(self, message: Received) -> None:
        if message.flags & proto.ERROR:
            raise MdevError(message.error or errno.EIO, f"the client refused {self}")
        access, data = proto.parse_dma_access(self.command, message.payload, self.command == Command.DMA_READ)
        if access.iova != self.iova or not 0 < access.count <= self.count:
            raise MdevError(errno.EPROTO, f"the client answered {self} with {access.count} bytes at {access.iova:#x}")
        self.moved, self.data = access.count, data

    def __str__(self) -> str:
        return f"{self.command.name} of {self.count} bytes at {self.iova:#x}"


class Link:
    """Sends on `sock`. Created on the connection's thread. Implements `mdevkit_vfio.ops.DmaTransport`."""

    def __init__(self, sock: socket.socket, limit: int) -> None:
        self._sock: Final = sock
        self._chunk: Final = min(limit, DMA_CHUNK)
        self._send_lock: Final = threading.Lock()
        self._thread: Final = threading.get_ident()
        self._ids: Final = itertools.count()
        self._lock: Final = threading.Lock()
        self._asked: Final[dict[int, _Question]] = {}
        self._forgotten: Final[dict[int, None]] = {}
        self._gone = False

    def send(self, head: bytes, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a whole message, with its descriptors at the first byte. Blocks while the client does not read.

        A message with descriptors may have up to `WHOLE` bytes.
        """
        if fds:
            socket.send_fds(self._sock, [head, payload], list(fds), NO_SIGNAL)
        elif len(payload) < WHOLE - len(head):
            self._sock.sendall(head + payload, NO_SIGNAL)
        else:
            # Not glued together: the copy would stop other threads for a while.
            with self._send_lock:
                self._sock.sendall(head, NO_SIGNAL | _MORE)
                self._sock.sendall(payload, NO_SIGNAL)

    def dma_read(self, iova: int, count: int) -> bytes:
        """See `DmaTransport.dma_read`. Long reads are several messages; a client may answer with less than was asked."""
        parts = []
        while count:
            question = self._ask(Command.DMA_READ, iova, min(count, self._chunk))
            parts.append(question.data)
            iova += question.moved
            count -= question.moved
        return b"".join(parts)

    def dma_write(self, iova: int, data: bytes) -> None:
        """See `DmaTransport.dma_write`."""
        view = memoryview(data)
        while view:
            part = view[: self._chunk]
            moved = self._ask(Command.DMA_WRITE, iova, len(part), part).moved
            iova += moved
            view = view[moved:]

    def deliver(self, message: Received) -> bool:
        """Hand a reply to the thread that waits for it; False if nobody ever asked."""
        with self._lock:
            if message.id in self._forgotten:
                del self._forgotten[message.id]
                return True
            question = self._asked.get(message.id)
            if question is None or question.command != message.command:
                return False
            del self._asked[message.id]
        question.answer(message)
        return True

    def hang_up(self) -> None:
        """Give ENOTCONN to whoever waits and whoever asks from now on; the client is gone."""
        with self._lock:
            self._gone = True
            waiting = list(self._asked.values())
            self._asked.clear()
        for question in waiting:
            question.error = MdevError(errno.ENOTCONN, f"the client left before it answered {question}")
            question.done.set()

    def _ask(self, command: Command, iova: int, count: int, data: memoryview | bytes = b"") -> _Question:
        question = _Question(command, iova, count)
        if threading.get_ident() == self._thread:
            raise MdevError(errno.EDEADLK, f"{question} would wait for a client that waits for this access; defer it")
        ident = self._enter(question)
        try:
            with self._send_lock:
                self._sock.sendall(proto.message(ident, command, proto.DmaAccess(iova, count).pack() + data), NO_SIGNAL)
        except OSError as error:
            self._give_up(ident)
            raise MdevError(errno.ENOTCONN, f"the client left before {question}") from error
        if not question.done.wait(DMA_TIMEOUT) and self._give_up(ident):
            raise MdevError(errno.ETIMEDOUT, f"the client did not answer {question} within {DMA_TIMEOUT:g} s")
        question.done.wait()
        if question.error is not None:
            raise question.error
        return question

    def _enter(self, question: _Question) -> int:
        """Give the question a message id that no other one under way has."""
        with self._lock:
            if self._gone:
                raise MdevError(errno.ENOTCONN, f"the client is gone, {question} cannot be asked")
            ident = next(i for n in self._ids if (i := n & 0xFFFF) not in self._asked and i not in self._forgotten)
            self._asked[ident] = question
        return ident

    def _give_up(self, ident: int) -> bool:
        """Stop waiting; False if the answer has come meanwhile."""
        with self._lock:
            if self._asked.pop(ident, None) is None:
                return False
            self._forgotten[ident] = None
            if len(self._forgotten) > _REMEMBERED:
                del self._forgotten[next(iter(self._forgotten))]
        return True
