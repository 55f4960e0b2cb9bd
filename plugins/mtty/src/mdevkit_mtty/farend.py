"""What a port's cable leads to on the host: a pseudo-terminal, or a UNIX socket that a program connects to.

A `Line` satisfies `mdevkit_mtty.uart.Wire` and moves bytes straight between the port and a descriptor that never blocks. It
keeps no byte itself: what the port has no room for stays with the kernel, which holds the writer off.

Threads. Every method of a line, except opening it, runs under the lock of its device: the guest's accesses send and receive
at once, on the connection's thread. The one thread here, a `Poller`'s, exists while a device has a line, and only waits for
what an access cannot do: bytes that come while the guest is idle, room at a slow reader, somebody connecting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import termios
import threading
import tty
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.sockets import Listen, listen_at, socket_identity, unlink_socket

from mdevkit_mtty.attributes import LOOPBACK, PTY, UNIX

#: How long a writer to a full terminal waits before it tries again unasked, in seconds.
RETRY: Final = 0.1

_INPUT: Final = select.EPOLLIN | select.EPOLLET
_GONE: Final = select.EPOLLHUP | select.EPOLLERR


class Line(ABC):
    """A far end with descriptors."""

    #: What a person opens or connects to.
    path: str

    def __init__(self) -> None:
        self._poller: Poller | None = None
        # Whether a read may find something, and whether the last write took everything.
        self._readable = False
        self._writable = True

    @property
    @abstractmethod
    def carrier(self) -> bool:
        """See `Wire.carrier`."""

    @abstractmethod
    def send(self, data: bytes) -> int:
        """See `Wire.send`."""

    @abstractmethod
    def receive(self, limit: int) -> bytes:
        """See `Wire.receive`."""

    @abstractmethod
    def attach(self, poller: Poller) -> None:
        """Have `poller` watch the descriptors from now on."""

    @abstractmethod
    def handle(self, fd: int, events: int) -> None:
        """Take note of `events` (``EPOLL*``) on `fd`; the ports are pumped afterwards."""

    @abstractmethod
    def retry(self) -> None:
        """Take note that `Poller.retry_soon` was asked for and the time is up."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; never raises."""

    def _watch_room(self, fd: int, wanted: bool) -> None:
        """Be told when `fd` takes bytes again, or no longer: else every byte a reader takes would wake the poller."""
        self._writable = not wanted
        if self._poller:
            self._poller.modify(fd, _INPUT | select.EPOLLOUT if wanted else _INPUT)

    def _note(self, fd: int, events: int) -> None:
        """Remember what `events` allow."""
        self._readable = True
        if events & (select.EPOLLOUT | _GONE) and not self._writable:
            self._watch_room(fd, False)


class PtyLine(Line):
    """A pseudo-terminal in raw mode; `path` is its slave, for a terminal program to open.

    The slave is kept open here too, so that programs come and go without losing a byte. When one hangs the terminal up
    (vhangup(2), as login programs do), every descriptor of it is dead, this one included, and a new one is opened.
    """

    def __init__(self) -> None:
        super().__init__()
        self._master, self._slave = _openpty()
        self.path = os.ttyname(self._slave)
        self._broken = False

    @property
    def carrier(self) -> bool:
        """On: it cannot be told whether a program has the slave open."""
        return not self._broken

    def send(self, data: bytes) -> int:
        """Write to the terminal; the kernel keeps 16 KiB or more for a reader that is slow or not there yet."""
        if self._broken:
            return len(data)
        sent = 0
        if self._writable:
            with _full_or_hung_up():
                sent = os.write(self._master, data)
            if sent < len(data):
                self._watch_room(self._master, True)
                # The kernel wakes the writer when the reader has made room, but looks for it where its worker brings it only
                # afterwards: if the reader then pauses, no event ever comes although there is room.
                if self._poller:
                    self._poller.retry_soon()
        return sent

    def receive(self, limit: int) -> bytes:
        """Read what was typed."""
        data = b""
        if self._readable:
            with _full_or_hung_up():
                data = os.read(self._master, limit)
            self._readable = bool(data)
        return data

    def attach(self, poller: Poller) -> None:
        """See `Line.attach`."""
        poller.add(self._master, self, _INPUT)
        self._poller = poller

    def handle(self, fd: int, events: int) -> None:
        """See `Line.handle`."""
        if events & select.EPOLLHUP:
            self._reopen()
        self._note(fd, events)

    def retry(self) -> None:
        """See `Line.retry`."""
        self._note(self._master, select.EPOLLOUT)

    def close(self) -> None:
        """See `Line.close`."""
        if self._poller:
            self._poller.discard(self._master)
        os.close(self._master)
        os.close(self._slave)

    def _reopen(self) -> None:
        """Replace the slave's descriptor; a terminal that cannot be opened any more is an unplugged cable."""
        try:
            slave = _open_raw(self.path)
        except OSError:
            self._broken = True
            return
        os.close(self._slave)
        self._slave = slave


@contextlib.contextmanager
def _full_or_hung_up() -> Iterator[None]:
    """Let EAGAIN and EIO of a terminal's master pass: nothing was moved, and an event says when to try again."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.EAGAIN, errno.EIO}:
            raise


def _openpty() -> tuple[int, int]:
    """Return master and slave of a new pseudo-terminal in raw mode, the master not blocking."""
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"far end {PTY}: {error.strerror}", PTY) from error
    os.set_blocking(master, False)
    tty.setraw(slave)
    return master, slave


def _open_raw(path: str) -> int:
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
    # Not setraw's default, TCSAFLUSH: other programs may be at it again, and nothing of theirs shall be thrown away.
    tty.setraw(slave, termios.TCSANOW)
    return slave


class UnixLine(Line):
    """A UNIX stream socket at `path`, made by `listen`, for one peer at a time; the next one waits until the first has left.

    Without a peer the cable is unplugged: no carrier, and what the port sends is lost. A peer that has only stopped sending
    still receives. What a peer sent before it left is delivered before the next one is let in.
    """

    def __init__(self, path: str, listen: Listen) -> None:
        super().__init__()
        # Whoever makes the socket may be another process, in another folder.
        self.path = str(Path(path).absolute())
        self._listener = listen(self.path)
        self._listener.setblocking(False)
        self._identity = socket_identity(self.path)
        self._peer: socket.socket | None = None
        # The peer sends no more; the peer receives no more.
        self._ended = False
        self._deaf = False

    @property
    def carrier(self) -> bool:
        """Whether a peer is connected."""
        return self._peer is not None

    def send(self, data: bytes) -> int:
        """Send to the peer, which may hold the port off by not reading."""
        if self._peer is None or self._deaf:
            return len(data)
        sent = 0
        if self._writable:
            try:
                sent = self._peer.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._deaf = True
                return len(data)
            if sent < len(data):
                self._watch_room(self._peer.fileno(), True)
        return sent

    def receive(self, limit: int) -> bytes:
        """Read from the peer; at the end of its bytes it may be let go."""
        data = b""
        if self._peer and self._readable:
            try:
                data = self._peer.recv(limit)
                self._ended = not data
            except BlockingIOError:
                data = b""
            except OSError:
                self._ended = self._deaf = True
            self._readable = bool(data)
            self._drop_if_gone()
        return data

    def attach(self, poller: Poller) -> None:
        """See `Line.attach`."""
        poller.add(self._listener.fileno(), self, select.EPOLLIN | select.EPOLLET)
        self._poller = poller

    def handle(self, fd: int, events: int) -> None:
        """See `Line.handle`."""
        if fd == self._listener.fileno():
            if self._peer is None:
                self._admit()
            return
        self._note(fd, events)
        if events & _GONE:
            self._deaf = True
            self._ended |= self._at_end()
            self._drop_if_gone()

    def retry(self) -> None:
        """See `Line.retry`: never asked for, since the kernel tells all there is to know of a socket."""

    def close(self) -> None:
        """See `Line.close`. The socket's file is removed unless somebody has put another one there."""
        self._drop()
        if self._poller:
            self._poller.discard(self._listener.fileno())
        unlink_socket(self._listener, self._identity, self.path)

    def _admit(self) -> None:
        """Take the next peer, if there is one."""
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        peer.setblocking(False)
        self._peer, self._ended, self._deaf = peer, False, False
        self._readable = self._writable = True
        if self._poller:
            self._poller.add(peer.fileno(), self, _INPUT)

    def _at_end(self) -> bool:
        """Whether nothing is left to be read of a peer that sends no more; needed while the guest takes nothing (no RTS)."""
        if self._peer is None:
            return True
        try:
            return not self._peer.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _drop_if_gone(self) -> None:
        if self._ended and self._deaf:
            self._drop()

    def _drop(self) -> None:
        """Let the peer go. The next one is let in by a later event, so that the guest can see the carrier fall between them."""
        if self._peer is None:
            return
        if self._poller:
            self._poller.discard(self._peer.fileno())
            self._poller.modify(self._listener.fileno(), select.EPOLLIN | select.EPOLLET)
        self._peer.close()
        self._peer = None
        self._readable = False


class Poller:
    """A thread that waits for the descriptors of one device's lines.

    `lock` is the device's; it is held while lines are told what happened and `pump` is called, and not while waiting.
    `add`, `modify` and `discard` are called with it held, `close` without.
    """

    def __init__(self, name: str, lock: AbstractContextManager[object], pump: Callable[[], None]) -> None:
        self._lock = lock
        self._pump = pump
        self._lines: dict[int, Line] = {}
        self._closing = self._retrying = False
        self._epoll = select.epoll()
        self._alarm = os.eventfd(0)
        self._epoll.register(self._alarm, select.EPOLLIN | select.EPOLLET)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start waiting."""
        self._thread.start()

    def add(self, fd: int, line: Line, events: int) -> None:
        """Tell `line` of `events` on `fd`."""
        self._epoll.register(fd, events)
        self._lines[fd] = line

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on `fd`; one that is already there is told once more."""
        self._epoll.modify(fd, events)

    def discard(self, fd: int) -> None:
        """Forget `fd`."""
        del self._lines[fd]
        self._epoll.unregister(fd)

    def retry_soon(self) -> None:
        """Tell every line to `retry` once nothing has happened for `RETRY` seconds."""
        if not self._retrying:
            self._retrying = True
            if threading.current_thread() is not self._thread:
                os.eventfd_write(self._alarm, 1)

    def close(self) -> None:
        """End the thread and wait for it."""
        self._closing = True
        if self._thread.ident is not None:
            os.eventfd_write(self._alarm, 1)
            self._thread.join()
        self._epoll.close()
        os.close(self._alarm)

    def _run(self) -> None:
        while not self._closing:
            ready = self._epoll.poll(RETRY if self._retrying else None)
            with self._lock:
                for fd, events in ready:
                    line = self._lines.get(fd)
                    if line is not None:
                        line.handle(fd, events)
                if not ready:
                    self._retry()
                self._pump()

    def _retry(self) -> None:
        self._retrying = False
        for line in set(self._lines.values()):
            line.retry()


class FarEnds:
    """The far ends of one device's ports; all loopback at first.

    `plug` is called with a port and its new line (None for loopback), `pump` after something happened on any line, both with
    the device's `lock` held. The methods here are called without it, from any thread. `listen` makes the sockets.
    """

    def __init__(
        self,
        ports: int,
        name: str,
        lock: AbstractContextManager[object],
        plug: Callable[[int, Line | None], None],
        pump: Callable[[], None],
        listen: Listen = listen_at,
    ) -> None:
        self._name = name
        self._listen = listen
        self._lock = lock
        self._plug = plug
        self._pump = pump
        # Serialises changes; taken before the device's lock, never inside it.
        self._changes = threading.Lock()
        self._specs = [LOOPBACK] * ports
        self._lines: list[Line | None] = [None] * ports
        self._poller: Poller | None = None
        self._closed = False

    def spec(self, port: int) -> str:
        """Return the text of a port's far end."""
        return self._specs[port]

    def path(self, port: int) -> str:
        """Return what to open or connect to; empty for loopback."""
        line = self._lines[port]
        return line.path if line else ""

    def set(self, port: int, spec: str) -> None:
        """Exchange a port's far end; the old one stays if the new one cannot be had.

        What `listen` raises for a socket path that cannot be used (as `mdevkit.sockets.listen_at`); ENODEV once closed.
        """
        with self._changes:
            if self._closed:
                raise MdevError(errno.ENODEV, f"far end {spec}: the device is being removed")
            if spec != self._specs[port]:
                self._exchange(port, spec)

    def close(self) -> None:
        """Give everything back; every port is on loopback afterwards, for good."""
        with self._changes:
            self._closed = True
            for port, spec in enumerate(self._specs):
                if spec != LOOPBACK:
                    self._exchange(port, LOOPBACK)

    def _exchange(self, port: int, spec: str) -> None:
        with ExitStack() as always, ExitStack() as undo:
            always.callback(self._stop_idle_poller)
            line = _open(spec, self._listen)
            if line:
                undo.callback(line.close)
                poller = self._running_poller()
            with self._lock:
                if line:
                    line.attach(poller)
                undo.pop_all()
                old, self._lines[port], self._specs[port] = self._lines[port], line, spec
                self._plug(port, line)
                if old:
                    old.close()

    def _running_poller(self) -> Poller:
        if self._poller is None:
            poller = Poller(self._name, self._lock, self._pump)
            try:
                poller.start()
            except RuntimeError as error:
                poller.close()
                raise MdevError(errno.EAGAIN, f"far end: no thread can be started: {error}") from error
            self._poller = poller
        return self._poller

    def _stop_idle_poller(self) -> None:
        if self._poller and not any(self._lines):
            self._poller.close()
            self._poller = None


def _open(spec: str, listen: Listen) -> Line | None:
    """Make the far end that `spec`, checked by the attribute's kind, names; None is loopback."""
    if spec == LOOPBACK:
        return None
    return PtyLine() if spec == PTY else UnixLine(spec.removeprefix(UNIX), listen)
