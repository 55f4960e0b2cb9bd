"""Sockets a host may not, or shall not, make itself: it asks the service, which opens them for whoever named the path.

Used in the hosts of root's service. `Broker.listen` runs on any thread, inside the vendor's or the driver's code; the answer
arrives on the connection's thread, which is never one that carries out a request.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.sockets import listen_at

from mdevkit_service.settings import endpoint_in, own_sockets

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from mdevkit.device import Mdev

    from mdevkit_service.host import Connection
    from mdevkit_service.wire import Message

#: Seconds the service gets to open a socket.
LIMIT: Final = 10.0

#: The request this thread carries out, and the connection it came on.
_acting: ContextVar[tuple[Connection | None, int]] = ContextVar("acting", default=(None, 0))


class _Question:
    def __init__(self, connection: Connection) -> None:
        self.connection: Final = connection
        self.done: Final = threading.Event()
        self.error: MdevError | None = None
        self.fd = -1


class Broker:
    """Gives devices their sockets: opens those of their own in `folder` itself, and asks the service for all others.

    A wrapper of the host's registry, since each device asks on its own account. `folder` is empty for a host that cannot make any
    socket as it is to be.
    """

    def __init__(self, folder: str) -> None:
        self._folder: Final = folder
        self._ids: Final = itertools.count(1)
        self._lock: Final = threading.Lock()
        #: The service that connected last.
        self._service: Connection | None = None
        self._asked: Final[dict[int, _Question]] = {}

    @hookimpl(wrapper=True)
    def parent_create(self, mdev: Mdev) -> Generator[None, Any, Any]:
        """Have a new device ask us for its sockets."""
        mdev.listen = partial(self.listen, mdev.name)
        return (yield)

    @contextmanager
    def acting(self, connection: Connection, request: int) -> Iterator[None]:
        """Carry out a request that came on `connection`, on this thread."""
        token = _acting.set((connection, request))
        try:
            yield
        finally:
            _acting.reset(token)

    def listen(self, uuid: str, path: str) -> socket.socket:
        """See `mdevkit.sockets.Listen`: what the service refuses, EPERM for a path nobody has named among that.

        ENOTCONN without a service, ETIMEDOUT and ECONNRESET when it does not answer.
        """
        if self._folder and str(Path(path)) in own_sockets(endpoint_in(self._folder, uuid)):
            return listen_at(path)
        number, question = self._question(path)
        connection, request = _acting.get()
        try:
            # The service knows who asked for what it wants done, and for nothing else.
            known = {"request": request} if connection is question.connection else {}
            question.connection.send({"ask": number, "path": path, "uuid": uuid, **known})
            if not question.done.wait(LIMIT):
                raise MdevError(errno.ETIMEDOUT, f"cannot listen at {path}: the service did not answer", path)
        finally:
            self._asked.pop(number, None)
        if question.error:
            raise question.error
        return socket.socket(fileno=question.fd)

    def _question(self, path: str) -> tuple[int, _Question]:
        with self._lock:
            if self._service is None:
                raise MdevError(errno.ENOTCONN, f"cannot listen at {path}: there is no service to open it", path)
            number = next(self._ids)
            question = self._asked[number] = _Question(self._service)
        return number, question

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

    def connected(self, connection: Connection) -> None:
        """Ask this service from now on."""
        with self._lock:
            self._service = connection

    def disconnected(self, connection: Connection) -> None:
        """Answer what will not be answered any more."""
        with self._lock:
            if self._service is connection:
                self._service = None
            lost = [question for question in self._asked.values() if question.connection is connection]
        for question in lost:
            question.error = MdevError(errno.ECONNRESET, "the service has ended")
            question.done.set()
