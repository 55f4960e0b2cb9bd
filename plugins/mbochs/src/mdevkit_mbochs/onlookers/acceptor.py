"""Takes connections, and waits a moment where the process cannot have one more. Runs on the loop's thread."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Final

from mdevkit_mbochs.onlookers.loop import Loop

#: Seconds in which nobody is accepted after that has failed.
SHORTAGE_PAUSE: Final = 0.1

log = logging.getLogger("mdevkit.display")


class Acceptor:
    """Gives each connection to `listener`, which its maker closes, to `admit`. `name` is for logs."""

    def __init__(self, loop: Loop, listener: socket.socket, name: str, admit: Callable[[socket.socket], None]) -> None:
        self._loop: Final = loop
        self._listener: Final = listener
        self._name: Final = name
        self._admit: Final = admit
        #: When the pause ends, if there is one.
        self._accept_after: float | None = None
        listener.setblocking(False)
        loop.add(listener.fileno(), self._accept)
        loop.ticks.append(self._tick)

    def close(self) -> None:
        """Accept nobody any more."""
        self._loop.ticks.remove(self._tick)
        self._loop.discard(self._listener.fileno())

    def _accept(self, events: int) -> None:
        del events
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors or memory: the listener would be ready again at once
            log.warning("%s: nobody can look: %s", self._name, error)
            self._loop.discard(self._listener.fileno())
            self._accept_after = time.monotonic() + SHORTAGE_PAUSE
            return
        sock.setblocking(False)
        self._admit(sock)

    def _tick(self, now: float) -> float | None:
        if self._accept_after is not None and now >= self._accept_after:
            self._loop.add(self._listener.fileno(), self._accept)
            self._accept_after = None
        return self._accept_after
