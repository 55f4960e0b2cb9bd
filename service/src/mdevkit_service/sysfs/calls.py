"""Requests to the service from many threads at once: libfuse's come and go, so connections are kept here and not by thread."""

from __future__ import annotations

import contextlib
import errno
import select
import threading
from typing import Any, Final

from mdevkit.client import Client
from mdevkit.errors import MdevError

#: Seconds the service gets to answer; more than a vendor takes for anything, less than a user waits for a hung program.
LIMIT: Final = 30.0
#: Connections that are kept for later.
_KEPT: Final = 8

_GONE: Final = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.EPROTO}


class Connection(Client):
    """One connection, whose answers must come in time."""

    def __init__(self, path: str, limit: float | None) -> None:
        super().__init__(path, start=False)
        self._socket.settimeout(limit)

    @property
    def stale(self) -> bool:
        """Whether the service has closed it: nothing else is there to be read between requests."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))


class Calls:
    """The service at the control socket `path`. Any thread may call."""

    def __init__(self, path: str, limit: float = LIMIT) -> None:
        #: Where the service listens.
        self.path: Final = path
        self._limit: Final = limit
        self._idle: Final[list[Connection]] = []
        self._lock: Final = threading.Lock()

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request and return the decoded answer; the service's error, EIO when there is no service or it hangs."""
        connection = self._take()
        try:
            answer = connection.request(method, path, body)
        except MdevError as error:
            # Whether the connection can be used any more is not to be told from the error, and another costs little.
            connection.close()
            raise _told(error) from error
        self._keep(connection)
        return answer

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                break
            if not connection.stale:
                return connection
            connection.close()
        try:
            return Connection(self.path, self._limit)
        except MdevError as error:
            raise _told(error) from error

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            if len(self._idle) < _KEPT:
                self._idle.append(connection)
                return
        connection.close()

    @contextlib.contextmanager
    def connected(self) -> Any:
        """Yield a connection of the caller's own, without a time limit: for events."""
        with Connection(self.path, None) as connection:
            yield connection


def _told(error: MdevError) -> MdevError:
    """Return the error a program that reads a file shall see: a broken connection is none of its business."""
    return MdevError(errno.EIO, str(error), error.subject) if error.errno in _GONE else error
