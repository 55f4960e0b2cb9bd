"""Sockets a host may not, or shall not, make itself: it asks the service, which opens them for whoever asked for the path.

Used in hosts of a system service. `Broker.listen` runs on the thread that carries out a request, inside the vendor's or the
driver's code; the answer arrives on the connection's thread.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mdevkit_service.host import Connection
    from mdevkit_service.wire import Message

#: Seconds the service gets to open a socket.
LIMIT: Final = 10.0

_acting: ContextVar[tuple[Connection, Any, str] | None] = ContextVar("acting", default=None)


class _Question:
    def __init__(self, connection: Connection) -> None:
        self.connection: Final = connection
        self.done: Final = threading.Event()
        self.error: MdevError | None = None
        self.fd = -1


class Broker:
    """Asks the service for sockets."""

    def __init__(self) -> None:
        self._ids: Final = itertools.count(1)
        self._asked: Final[dict[int, _Question]] = {}

    @contextmanager
    def acting(self, connection: Connection, message: Message) -> Iterator[None]:
        """Carry out a request that came on `connection`, on this thread."""
        token = _acting.set((connection, message.get("peer"), message.get("args", {}).get("uuid", "")))
        try:
            yield
        finally:
            _acting.reset(token)

    def listen(self, path: str) -> socket.socket:
        """See `mdevkit.sockets.Listen`; EPERM outside a request, ETIMEDOUT and ECONNRESET when the service does not answer."""
        acting = _acting.get()
        if acting is None:
            raise MdevError(errno.EPERM, f"cannot listen at {path}: nobody asked for it", path)
        connection, peer, uuid = acting
        number, question = next(self._ids), _Question(connection)
        self._asked[number] = question
        try:
            connection.send({"ask": number, "path": path, "peer": peer, "uuid": uuid})
            if not question.done.wait(LIMIT):
                raise MdevError(errno.ETIMEDOUT, f"cannot listen at {path}: the service did not answer", path)
        finally:
            self._asked.pop(number, None)
        if question.error:
            raise question.error
        return socket.socket(fileno=question.fd)

    def answered(self, message: Message, fds: list[int]) -> None:
        """Take the service's answer."""
        question = self._asked.pop(message["answer"], None)
        if question is None:
            for fd in fds:
                os.close(fd)
            return
        if "error" in message:
            question.error = MdevError(message["error"]["errno"], message["error"]["message"])
        elif fds:
            question.fd = fds[0]
        else:
            question.error = MdevError(errno.EPROTO, "the service sent no descriptor")
        question.done.set()

    def disconnected(self, connection: Connection) -> None:
        """Answer what will not be answered any more."""
        for question in list(self._asked.values()):
            if question.connection is connection:
                question.error = MdevError(errno.ECONNRESET, "the service has ended")
                question.done.set()
