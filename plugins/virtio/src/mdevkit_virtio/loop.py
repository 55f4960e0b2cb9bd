"""The data thread's loop in plain Python: moves frames while there are any, polls for a while, then sleeps on kicks.

`run` belongs to one thread; `stop` may be called by any.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Sequence
from typing import Final, Protocol

from mdevkit_virtio.layout import MAX_BURST, Wait
from mdevkit_virtio.net import PyMover
from mdevkit_virtio.ops import drain_eventfd
from mdevkit_virtio.ring import PyRing

#: How long to sleep when a driver gave no kick descriptor and so has to be polled.
UNKICKED_MS: Final = 1


class Kicked(Protocol):
    """A ring, of whatever engine, as far as its kicks go."""

    kick_fd: int
    kicks: int


class PyLoop:
    """Runs movers until it is stopped. `spin_us`: how long to poll without traffic before sleeping."""

    def __init__(self, movers: Sequence[PyMover], *, spin_us: int = 50, burst: int = MAX_BURST) -> None:
        self.movers: Final = tuple(movers)
        self.sleeps = 0
        self._spin_ns: Final = spin_us * 1000
        self._burst: Final = burst
        self._stop_fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = False

    def run(self) -> bool:
        """Move frames until `stop` (true) or until a mover has halted, because a ring of it is broken (false).

        A stop that came before is honoured. May be called again after either.
        """
        idle_since = 0
        self._refuse_kicks()
        while True:
            moved, sound = self._move_all()
            if self._stopped:
                self._take_stop()
                return True
            if not sound:
                return False
            now = 0 if moved else time.monotonic_ns()
            idle_since = now if moved or not idle_since else idle_since
            if not moved and now - idle_since >= self._spin_ns:
                self._sleep()
                idle_since = 0

    def stop(self) -> None:
        """Make `run` return; any thread."""
        # In this order, or `run` could return before the descriptor is written to, which would then stay ready and keep it awake.
        os.eventfd_write(self._stop_fd, 1)
        self._stopped = True

    def close(self) -> None:
        """Give the descriptors back; nobody may be in `run`."""
        os.close(self._stop_fd)

    def _refuse_kicks(self) -> None:
        """No kicks while polling."""
        for mover in self._active():
            if mover.rx is not None:
                mover.rx.notify(False)
            mover.tx.notify(False)

    def _take_stop(self) -> None:
        self._stopped = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._stop_fd)

    def _active(self) -> list[PyMover]:
        return [mover for mover in self.movers if not mover.halted]

    def _move_all(self) -> tuple[int, bool]:
        moved, sound = 0, True
        for mover in self._active():
            moved += mover.move(self._burst)
            if mover.wait is Wait.BROKEN:
                mover.halted = True
                sound = False
        return moved, sound

    def _sleep(self) -> None:
        awaited = [_awaited(mover) for mover in self._active()]
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        # Every driver is asked, also after one has answered; a broken ring is work as well.
        busy = [ring.notify(True) or bool(ring.fault) for ring in awaited]
        if not any(busy) and not self._stopped:
            for ring in awaited:
                if ring.kick_fd >= 0:
                    poll.register(ring.kick_fd, select.POLLIN)
            self.sleeps += 1
            poll.poll(UNKICKED_MS if any(ring.kick_fd < 0 for ring in awaited) else None)
        for ring in awaited:
            drain_kick(ring)
            ring.notify(False)


def _awaited(mover: PyMover) -> PyRing:
    """Return the ring whose driver has to act before this mover can go on."""
    return mover.rx if mover.wait is Wait.FULL and mover.rx is not None else mover.tx


def drain_kick(ring: Kicked) -> None:
    """Empty the kick eventfd; never blocks, whatever the client made of it."""
    if ring.kick_fd >= 0 and drain_eventfd(ring.kick_fd):
        ring.kicks += 1
