"""One data thread: it moves the frames of one device or queue pair.

Every other thread may call the methods here, except from `on_halt`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mdevkit_virtio.engine import Engine, Loop, Mover
from mdevkit_virtio.layout import MAX_BURST
from mdevkit_virtio.pausing import PausableThread

_log: Final = logging.getLogger(__name__)


class DataThread(PausableThread):
    """Moves frames from `start` to `close`; a turn is a burst.

    `on_halt` is called on this thread with every mover that was halted because a ring of it is broken; it must not wait for
    another thread. `spin_us`: how long to poll without traffic before sleeping on kicks.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        spin_us: int = 50,
        burst: int = MAX_BURST,
        on_halt: Callable[[Mover], None] | None = None,
    ) -> None:
        super().__init__(name)
        self._engine: Final = engine
        self._options: Final = (spin_us, burst)
        self._on_halt: Final = on_halt
        self._movers: tuple[Mover, ...] = ()
        self._loop: Loop = engine.loop(())
        self._reported: set[int] = set()

    @property
    def movers(self) -> tuple[Mover, ...]:
        """What is moved."""
        return self._movers

    @property
    def sleeps(self) -> int:
        """How often the thread has gone to sleep since the movers were last set."""
        return self._loop.sleeps

    def set_movers(self, movers: Sequence[Mover]) -> None:
        """Move these from now on. A halted one is moved again only after its `halted` has been cleared."""
        with self.paused():
            loop = self._engine.loop(movers, spin_us=self._options[0], burst=self._options[1])
            self._loop.close()
            self._loop = loop
            self._movers = tuple(movers)
            self._reported.clear()

    def _turn(self) -> None:
        try:
            self._loop.run()
        except Exception:  # noqa: BLE001  # a bug in an engine must break one device, not leave its driver waiting for ever
            _log.exception("%s: the engine failed, its queues are halted", self.name)
            for mover in self._movers:
                mover.halted = True
        # Also after a stop: a mover may have halted in the very burst that ended for it, and no later run tells of that one.
        self._report()

    def _interrupt(self) -> None:
        self._loop.stop()

    def _call_fds(self) -> Iterable[int]:
        return [ring.call_fd for mover in self._movers for ring in (mover.tx, mover.rx) if ring is not None]

    def _release(self) -> None:
        self._loop.close()

    def _report(self) -> None:
        for index, mover in enumerate(self._movers):
            if mover.halted and index not in self._reported:
                self._reported.add(index)
                if self._on_halt is not None:
                    self._on_halt(mover)
