"""Interrupts to a driver: what its callbacks become for those who raise them.

Engines signal an eventfd. A driver that gave a function instead gets an eventfd of ours, and one thread per device, started with
the first such function, calls the functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from typing import Final

from mdevkit_virtio.ops import Callback

_log: Final = logging.getLogger("mdevkit.virtio")


class ConfigInterrupt:
    """The configuration's callback. Any thread may raise it; after `set` has returned, nobody uses the one before any more."""

    def __init__(self) -> None:
        # A function may set another callback: the lock is its own thread's again.
        self._lock: Final = threading.RLock()
        self._callback: Callback | None = None

    def set(self, callback: Callback | None) -> None:
        """Use this callback from now on, None for none."""
        with self._lock:
            self._callback = callback

    def fire(self) -> None:
        """Tell the driver that configuration or status have changed."""
        with self._lock:
            if self._callback is not None:
                _call(self._callback)


class FunctionCaller:
    """Calls the functions of queue callbacks when their eventfds are signalled. One thread, the driver's, makes changes."""

    def __init__(self, name: str) -> None:
        self._name: Final = name
        self._poll: Final = select.epoll()
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.EPOLLIN)
        #: Held while a function is called, so that who removes it knows it is not being called.
        self._lock: Final = threading.RLock()
        self._functions: Final[dict[int, Callback]] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, callback: Callback) -> int:
        """Return an eventfd that makes the callback's function be called; `remove` closes it."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            self._functions[fd] = callback
        self._poll.register(fd, select.EPOLLIN)
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=f"{self._name} irq", daemon=True)
            self._thread.start()
        return fd

    def remove(self, fd: int) -> None:
        """Forget an eventfd that nobody signals any more; its function is not called after this has returned."""
        with self._lock:
            del self._functions[fd]
            self._poll.unregister(fd)
            os.close(fd)

    def close(self) -> None:
        """End the thread; every eventfd has been removed. Not from a function."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        self._poll.close()
        os.close(self._wake)

    def _main(self) -> None:
        while not self._closing:
            for fd, _ in self._poll.poll():
                with self._lock:
                    callback = self._functions.get(fd)
                    if callback is not None:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(fd)
                        _call(callback)


def _call(callback: Callback) -> None:
    try:
        callback()
    except Exception:  # noqa: BLE001  # a driver's bug must not end the thread that serves its other queues
        _log.exception("a callback of the driver failed")
