"""A thread that works for one device, and stands still while somebody changes what it works on."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from mdevkit_virtio.ops import drain_eventfd

#: How often eventfds are drained while the thread does not stop, in seconds.
_DRAIN_INTERVAL: Final = 0.01


class PausableThread(ABC):
    """Takes one turn after another from `start` to `close`, except inside `paused`.

    The thread serves one client's queues only, because a client can hold it up (by filling its eventfd). Every other thread
    may call the methods here; the thread itself may not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        #: Held by the one thread that changes things.
        self._control: Final = threading.RLock()
        self._state: Final = threading.Condition()
        self._hold = 0
        self._parked = False
        self._closing = False
        self._thread: Final = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether `start` has been called."""
        return self._thread.ident is not None

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread, for its affinity and processor time; 0 before `start`."""
        return self._thread.native_id or 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the block: rings, descriptors, memory tables and what is served may be changed there.

        One thread at a time is let in; blocks may nest. It takes as long as one turn.
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

    def close(self) -> None:
        """Stop the thread for good and give its descriptors back. Closing twice is harmless."""
        with self._control:
            with self._state:
                if self._closing:
                    return
                self._closing = True
                self._state.notify_all()
            if self.started:
                self._stop_until(lambda: not self._thread.is_alive())
                self._thread.join()
            self._release()

    @property
    def _wanted(self) -> bool:
        """Whether somebody waits for the thread to stand still or to end; a long turn looks at it now and then."""
        return self._hold > 0 or self._closing

    # -- what the thread does ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _turn(self) -> None:
        """Work until there is nothing to do, and sleep until there is, or until `_interrupt`; on the thread. It must not raise."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Have the turn that runs, or else the next one, return soon; from any other thread."""

    @abstractmethod
    def _call_fds(self) -> Iterable[int]:
        """Return the eventfds that the thread writes to, negative ones where there is none; from any other thread."""

    @abstractmethod
    def _release(self) -> None:
        """Give the descriptors back; once, after the thread has ended."""

    # ------------------------------------------------------------------------------------------------------------------------

    def _stop_until(self, reached: Callable[[], bool]) -> None:
        self._interrupt()
        with self._state:
            while not reached():
                if not self._state.wait(_DRAIN_INTERVAL):
                    self._free_writer()

    def _free_writer(self) -> None:
        """Let go of a thread that a client keeps blocked in a write to its eventfd."""
        for fd in self._call_fds():
            if fd >= 0:
                drain_eventfd(fd)

    def _main(self) -> None:
        while self._may_go_on():
            self._turn()
        with self._state:
            self._state.notify_all()

    def _may_go_on(self) -> bool:
        """Wait while somebody holds the thread; false when it is to end."""
        with self._state:
            while self._hold and not self._closing:
                self._parked = True
                self._state.notify_all()
                self._state.wait()
            self._parked = False
            return not self._closing
