"""One data thread: it moves the frames of one device or queue pair, and stands still while somebody changes what it works on.

The thread serves one client's queues only, because a client can hold it up (by filling its eventfd). Every other thread
may call the methods here, except from `on_halt`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from mdevkit_virtio.engine import Engine, Loop, Mover
from mdevkit_virtio.layout import MAX_BURST

_log: Final = logging.getLogger(__name__)

#: How often eventfds are drained while the thread does not stop, in seconds.
_DRAIN_INTERVAL: Final = 0.01


class DataThread:
    """Moves frames from `start` to `close`.

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
        self.name: Final = name
        self._engine: Final = engine
        self._options: Final = (spin_us, burst)
        self._on_halt: Final = on_halt
        #: Held by the one thread that changes things.
        self._control: Final = threading.RLock()
        self._state: Final = threading.Condition()
        self._hold = 0
        self._parked = False
        self._closing = False
        self._movers: tuple[Mover, ...] = ()
        self._loop: Loop = engine.loop(())
        self._reported: set[int] = set()
        self._thread: Final = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread for good and give its descriptors back. Closing twice is harmless."""
        with self._control, self._state:
            if self._closing:
                return
            self._closing = True
            self._state.notify_all()
        if self._thread.ident is not None:
            self._stop_until(lambda: not self._thread.is_alive())
            self._thread.join()
        self._loop.close()

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread, for its affinity and processor time; 0 before `start`."""
        return self._thread.native_id or 0

    @property
    def movers(self) -> tuple[Mover, ...]:
        """What is moved."""
        return self._movers

    @property
    def sleeps(self) -> int:
        """How often the thread has gone to sleep since the movers were last set."""
        return self._loop.sleeps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the block: rings, descriptors, memory tables and movers may be changed there.

        One thread at a time is let in; blocks may nest. It takes as long as one burst.
        """
        with self._control:
            self._hold += 1
            try:
                if self._hold == 1 and self._thread.is_alive():
                    self._stop_until(lambda: self._parked)
                yield
            finally:
                with self._state:
                    self._hold -= 1
                    self._state.notify_all()

    def set_movers(self, movers: Sequence[Mover]) -> None:
        """Move these from now on. A halted one is moved again only after its `halted` has been cleared."""
        with self.paused():
            loop = self._engine.loop(movers, spin_us=self._options[0], burst=self._options[1])
            self._loop.close()
            self._loop = loop
            self._movers = tuple(movers)
            self._reported.clear()

    def _stop_until(self, reached: Callable[[], bool]) -> None:
        self._loop.stop()
        with self._state:
            while not reached():
                if not self._state.wait(_DRAIN_INTERVAL):
                    self._free_writers()

    def _free_writers(self) -> None:
        """Let go of a thread that a client keeps blocked in a write to its eventfd."""
        for mover in self._movers:
            for ring in (mover.tx, mover.rx):
                if ring is not None and ring.call_fd >= 0:
                    with contextlib.suppress(OSError):
                        os.preadv(ring.call_fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def _main(self) -> None:
        while self._wait_for_work():
            try:
                sound = self._loop.run()
            except Exception:  # noqa: BLE001  # a bug in an engine must break one device, not leave its driver waiting for ever
                _log.exception("%s: the engine failed, its queues are halted", self.name)
                for mover in self._movers:
                    mover.halted = True
                sound = False
            if not sound:
                self._report()
        with self._state:
            self._state.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait while somebody holds the thread; false when it is to end."""
        with self._state:
            while self._hold and not self._closing:
                self._parked = True
                self._state.notify_all()
                self._state.wait()
            self._parked = False
            return not self._closing

    def _report(self) -> None:
        for index, mover in enumerate(self._movers):
            if mover.halted and index not in self._reported:
                self._reported.add(index)
                if self._on_halt is not None:
                    self._on_halt(mover)
