"""Where a backend's connections come from: a socket it serves, or one that the frontend serves and it connects to.

A `Source` belongs to the thread of one server; only `open` is called before that runs. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Collection, Sequence
from typing import Final, Protocol

from mdevkit.errors import MdevError
from mdevkit.sockets import MAX_PATH, Listen, listen_at, socket_identity, unlink_socket

log = logging.getLogger("mdevkit.virtio")

#: Connections that may be silent at the same time; beyond it the oldest has to go.
MAX_SILENT: Final = 32
#: Seconds without accepting after somebody was turned away: connecting in a loop must not cost the other devices their rate.
REFUSAL_PAUSE: Final = 0.001
#: Seconds without accepting after the process has run out of descriptors.
SHORTAGE_PAUSE: Final = 0.1
#: Seconds between two attempts to connect: at first, and at most; each one that fails doubles them.
BACKOFF_FIRST: Final = 0.05
BACKOFF_MOST: Final = 1.0


class Source(Protocol):
    """Gives a server its clients, one after the other."""

    @property
    def path(self) -> str:
        """The socket's path."""
        ...

    @property
    def connects(self) -> bool:
        """Whether the frontend is the one who serves the socket."""
        ...

    def open(self) -> None:
        """Begin; MdevError for a path that cannot be used."""
        ...

    def close(self) -> None:
        """End; nothing of it is left."""
        ...

    def watched(self, *, busy: bool) -> Sequence[int]:
        """Return the descriptors that are to be polled for input; `busy` while there is a client."""
        ...

    def patience(self, *, busy: bool) -> float | None:
        """Return the seconds after which `take` wants to be called in any case; None for never."""
        ...

    def take(self, ready: Collection[int], *, refusing: bool) -> socket.socket | None:
        """Deal with what is `ready`, and return the next client, if there is one. With `refusing` all are turned away."""
        ...

    def ended(self, seconds: float) -> None:
        """Note that a client was there for `seconds`, and is gone."""
        ...


class Listening:
    """A socket served at `path`, made by `listen`.

    A connection becomes the client with its first byte: one that says nothing keeps nobody out. All others are closed while there
    is a client that has not hung up.
    """

    connects: Final = False

    def __init__(self, path: str, listen: Listen = listen_at) -> None:
        self.path: Final = path
        self._listen: Final = listen
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._silent: list[socket.socket] = []
        self._accept_after = 0.0

    def open(self) -> None:
        """See `Source.open`: ENAMETOOLONG, ENOENT, ENOTDIR, EACCES or EADDRINUSE."""
        self._listener = self._listen(self.path)
        self._listener.setblocking(False)
        self._identity = socket_identity(self.path)

    def close(self) -> None:
        """See `Source.close`."""
        self._turn_away()
        if self._listener is not None:
            unlink_socket(self._listener, self._identity, self.path)
            self._listener = None

    def watched(self, *, busy: bool) -> Sequence[int]:  # noqa: ARG002  # the protocol's
        """See `Source.watched`."""
        fds = [sock.fileno() for sock in self._silent]
        if self._listener is not None and time.monotonic() >= self._accept_after:
            fds.append(self._listener.fileno())
        return fds

    def patience(self, *, busy: bool) -> float | None:  # noqa: ARG002  # the protocol's
        """See `Source.patience`."""
        left = self._accept_after - time.monotonic()
        return left if left > 0 else None

    def take(self, ready: Collection[int], *, refusing: bool) -> socket.socket | None:
        """See `Source.take`."""
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept()
        if refusing:
            self._turn_away()
            return None
        for sock in [sock for sock in self._silent if _readable(sock)]:
            self._silent.remove(sock)
            if _speaks(sock):
                # One that has spoken and gone keeps nobody out: whoever else is here may be the same program, back again.
                if not hung_up(sock):
                    self._turn_away()
                return sock
            sock.close()
        return None

    def ended(self, seconds: float) -> None:
        """See `Source.ended`."""

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("no client can be accepted at %s: %s", self.path, error)
            self._accept_after = time.monotonic() + SHORTAGE_PAUSE
            return
        sock.setblocking(False)
        self._silent.append(sock)
        if len(self._silent) > MAX_SILENT:
            self._silent.pop(0).close()
            self._accept_after = time.monotonic() + REFUSAL_PAUSE

    def _turn_away(self) -> None:
        if self._silent:
            self._accept_after = time.monotonic() + REFUSAL_PAUSE
        for sock in self._silent:
            sock.close()
        self._silent.clear()


class Connecting:
    """A socket that a frontend serves at `path` (QEMU's ``server=on``, DPDK's ``server=1``): connected to again and again."""

    connects: Final = True

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._backoff = BACKOFF_FIRST
        self._next = 0.0

    def open(self) -> None:
        """See `Source.open`: ENAMETOOLONG. There need be no socket yet."""
        length = len(os.fsencode(self.path))
        if length > MAX_PATH:
            raise MdevError(errno.ENAMETOOLONG, f"{self.path} has {length} bytes, a socket's path may have {MAX_PATH}", self.path)

    def close(self) -> None:
        """See `Source.close`."""

    def watched(self, *, busy: bool) -> Sequence[int]:  # noqa: ARG002  # the protocol's
        """See `Source.watched`."""
        return ()

    def patience(self, *, busy: bool) -> float | None:
        """See `Source.patience`."""
        return None if busy else max(0.0, self._next - time.monotonic())

    def take(self, ready: Collection[int], *, refusing: bool) -> socket.socket | None:  # noqa: ARG002  # the protocol's
        """See `Source.take`."""
        if refusing or time.monotonic() < self._next:
            return None
        try:
            return self._connect()
        except OSError as error:
            # Also when its backlog is full, or no descriptor left. What is not there yet will be, what was may come back: QEMU
            # restarts, too.
            log.debug("cannot connect to %s: %s", self.path, error)
            self._wait()
            return None

    def _connect(self) -> socket.socket:
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            sock.connect(os.fsencode(self.path))
            undo.pop_all()
            return sock

    def ended(self, seconds: float) -> None:
        """See `Source.ended`: a frontend that closes at once is not asked at full speed."""
        if seconds > BACKOFF_MOST:
            self._backoff = BACKOFF_FIRST
        self._wait()

    def _wait(self) -> None:
        self._next = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, BACKOFF_MOST)


def hung_up(sock: socket.socket) -> bool:
    """Whether the other end is closed, though there may be messages left."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _speaks(sock: socket.socket) -> bool:
    """Whether there is a byte to read; without taking it, nor the descriptors that come with it."""
    with contextlib.suppress(OSError):
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False
