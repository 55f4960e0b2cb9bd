"""Serves a display to VNC viewers: connections, their order, and how often the picture is looked at. Runs on the loop's thread.

While no viewer waits for an update the picture is not touched. While one does, it is looked at as often as that takes at most a
quarter of a processor, for all viewers together, and `MOST_OFTEN` at most.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from mmap import mmap
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.screen import Frame

from mdevkit_mbochs.onlookers.acceptor import Acceptor
from mdevkit_mbochs.onlookers.loop import Loop
from mdevkit_mbochs.onlookers.rfb import RfbError
from mdevkit_mbochs.onlookers.tiles import Tiles
from mdevkit_mbochs.onlookers.viewer import Viewer

#: Seconds between two looks, at least; and at most, while somebody waits.
MOST_OFTEN: Final = 1 / 30
LEAST_OFTEN: Final = 1 / 4
#: So many times as long as a look took.
_REST: Final = 3
#: Seconds a viewer gets to be let in; that a wrong password costs; and to take what it is told at the end.
PATIENCE: Final = 10.0
PENALTY: Final = 1.0
#: Viewers at the same time; and connections, with those who are to be told that there is no room.
MOST: Final = 16
MOST_CONNECTIONS: Final = 2 * MOST
#: Bytes taken from a viewer at once: it can say something laborious with every few, and others wait meanwhile.
_PART: Final = 1 << 12

Scanout = Callable[[], tuple[Frame, mmap] | None]
#: Returns what viewers must know, None for nothing; MdevError keeps everybody out.
Password = Callable[[], bytes | None]

log = logging.getLogger("mdevkit.display")


class _Connection:
    def __init__(self, sock: socket.socket, viewer: Viewer, deadline: float) -> None:
        self.sock: Final = sock
        self.viewer: Final = viewer
        #: When it has to be let in, or is told its last words, or has to have taken them.
        self.deadline = deadline
        self.events = select.EPOLLIN


class VncServer:
    """Serves `listener`, which its maker closes. `name` is for titles and logs."""

    def __init__(self, loop: Loop, listener: socket.socket, name: str, scanout: Scanout, password: Password) -> None:
        self._loop: Final = loop
        self._name: Final = name
        self._scanout: Final = scanout
        self._password: Final = password
        self._tiles = Tiles()
        self._connections: Final[set[_Connection]] = set()
        #: 0 while nothing has been seen.
        self._next_look = 0.0
        self._acceptor: Final = Acceptor(loop, listener, name, self._admit)
        loop.ticks.append(self._tick)

    def close(self) -> None:
        """Send everybody away."""
        self._loop.ticks.remove(self._tick)
        self._acceptor.close()
        for connection in list(self._connections):
            self._drop(connection)

    # -- connections -------------------------------------------------------------------------------------------------

    def _admit(self, sock: socket.socket) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, self._greet(), time.monotonic() + PATIENCE)
        self._connections.add(connection)
        self._loop.add(sock.fileno(), partial(self._handle, connection))
        self._send(connection)

    def _greet(self) -> Viewer:
        if time.monotonic() >= self._next_look:
            self._look()  # nobody may have asked for a long time, and a newcomer is told the size at once
        if len(self._connections) >= MOST:
            return Viewer(self._tiles, self._name, refusal=f"{MOST} viewers are looking already")
        try:
            return Viewer(self._tiles, self._name, self._password())
        except MdevError as error:
            log.warning("%s: a VNC viewer is refused: %s", self._name, error)
            return Viewer(self._tiles, self._name, refusal="the password file cannot be read")

    def _handle(self, connection: _Connection, events: int) -> None:
        try:
            if events & ~select.EPOLLOUT and not self._receive(connection):
                return
            self._send(connection)
        except RfbError as error:
            log.info("%s: a VNC viewer is sent away: %s", self._name, error)
            self._drop(connection)

    def _receive(self, connection: _Connection) -> bool:
        """Take what has come; False if that was the end."""
        try:
            data = connection.sock.recv(_PART)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return False
        viewer = connection.viewer
        viewer.feed(data)
        if viewer.ended and connection.events:
            connection.deadline = time.monotonic() + (PENALTY if viewer.last_words else PATIENCE)
        return True

    def _send(self, connection: _Connection) -> None:
        viewer = connection.viewer
        with suppress(BlockingIOError):
            try:
                while viewer.out:
                    del viewer.out[: connection.sock.send(memoryview(viewer.out)[: 1 << 20], socket.MSG_NOSIGNAL)]
            except BlockingIOError:
                raise
            except OSError:
                self._drop(connection)
                return
        if viewer.ended and not viewer.out and not viewer.last_words:
            self._drop(connection)
            return
        self._expect(connection)

    def _expect(self, connection: _Connection) -> None:
        """Wait for what can happen next; a viewer that has ended is heard no more."""
        viewer = connection.viewer
        events = (0 if viewer.ended else select.EPOLLIN) | (select.EPOLLOUT if viewer.out else 0)
        if events != connection.events:
            connection.events = events
            self._loop.modify(connection.sock.fileno(), events)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._loop.discard(connection.sock.fileno())
            with suppress(OSError):
                connection.sock.close()

    # -- time --------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> float | None:
        due = [when for connection in list(self._connections) if (when := self._time(connection, now)) is not None]
        if not self._connections:
            return self._forget(now)
        if any(self._waits(connection) for connection in self._connections):
            self._update()
            if now >= self._next_look:
                self._look()
                self._update()
            due.append(self._next_look)
        return min(due, default=None)

    @staticmethod
    def _waits(connection: _Connection) -> bool:
        viewer = connection.viewer
        return viewer.wants and not viewer.out

    def _time(self, connection: _Connection, now: float) -> float | None:
        """Do what is due for a connection that is not let in, or no more; return when something will be."""
        viewer = connection.viewer
        if viewer.ready:
            return None
        if now < connection.deadline:
            return connection.deadline
        if not viewer.last_words:
            self._drop(connection)
            return None
        viewer.out += viewer.last_words
        viewer.last_words = b""
        connection.deadline = now + PATIENCE
        self._send(connection)
        return connection.deadline

    def _forget(self, now: float) -> float | None:
        """Let go of what was seen, megabytes, but not before a newcomer would be looked for anew; return when that will be."""
        if self._next_look and now >= self._next_look:
            self._tiles, self._next_look = Tiles(), 0.0
        return self._next_look or None

    def _look(self) -> None:
        """Compare the picture with what was seen last, and choose when to do so again."""
        began = time.monotonic()
        changed = self._tiles.look(self._shown())
        ended = time.monotonic()
        self._next_look = ended + min(LEAST_OFTEN, max(MOST_OFTEN, _REST * (ended - began)))
        for connection in self._connections:
            connection.viewer.dirty |= changed

    def _shown(self) -> tuple[Frame, mmap] | None:
        try:
            return self._scanout()
        except OSError as error:
            log.warning("%s: nothing to show: %s", self._name, error)
            return None

    def _update(self) -> None:
        for connection in list(self._connections):
            if connection.viewer.ready and connection.viewer.update():
                self._send(connection)
