"""Interrupts of one virtio device, and whatever else its driver waits for: a thread that sleeps until a descriptor is ready.

Handlers run one at a time, on this thread, and must not wait for anything: a handler that has to holds up the interrupts of its
device, and of no other. `watch`, `change` and `unwatch` may be called from any thread, a handler included.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from mdevkit.errors import MdevError

log = logging.getLogger("mdevkit.virtio")

#: Called with the events that have come (``select.EPOLL...``); spurious calls are possible.
Handler = Callable[[int], None]

IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT


class InterruptThread:
    """Waits for descriptors and calls their handlers."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self._handlers: Final[dict[int, Handler]] = {}
        # Held while a handler runs; taken by whoever must not run at the same time. Never held over a wait of ours.
        self._serial: Final = threading.RLock()
        self._posted: Final[deque[Callable[[], None]]] = deque()
        self._closing = False
        #: How often the thread has been woken.
        self.wakeups = 0
        self._epoll: Final = select.epoll()
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake, self._run_posted)
        self._thread: Final = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread; 0 before `start`."""
        return self._thread.native_id or 0

    @property
    def current(self) -> bool:
        """Whether the caller is a handler."""
        return threading.current_thread() is self._thread

    def watch(self, fd: int, handler: Handler, events: int = IN) -> None:
        """Call `handler` whenever `fd`, which stays the caller's, is ready. It must not be watched already."""
        with self._serial:
            self._epoll.register(fd, events)
            self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of a descriptor that is watched; 0 for errors and hang-ups only."""
        with self._serial:
            self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; its handler does not run any more when this returns. Harmless if it is not watched."""
        with self._serial:
            if self._handlers.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def post(self, function: Callable[[], None]) -> None:
        """Call a function on the thread, soon, as a handler."""
        self._posted.append(function)
        with self._serial:
            if not self._closing:
                os.eventfd_write(self._wake, 1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep every handler from running inside the block, which takes what the one that runs now takes."""
        with self._serial:
            yield

    def close(self) -> None:
        """End the thread; no handler runs any more. Closing twice is harmless; EDEADLK from a handler."""
        if self.current:
            raise MdevError(errno.EDEADLK, f"{self.name} cannot be ended by a handler of its own", self)
        with self._serial:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closing:
            ready = self._epoll.poll()
            self.wakeups += 1
            for fd, events in ready:
                with self._serial:
                    if handler := self._handlers.get(fd):
                        self._call(fd, handler, events)

    def _run_posted(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        # Not those that these post: they would keep everybody else from their turn.
        for _ in range(len(self._posted)):
            function = self._posted.popleft()
            try:
                function()
            except Exception:
                log.exception("%s: %s failed", self.name, function)

    def _call(self, fd: int, handler: Handler, events: int) -> None:
        try:
            handler(events)
        except Exception:
            # A descriptor that stays ready would call it again at once, for ever.
            log.exception("%s: a handler failed and is not called any more", self.name)
            self.unwatch(fd)


class EventFd:
    """An eventfd that a device writes to, and the handler of it."""

    def __init__(self, thread: InterruptThread, function: Callable[[], None]) -> None:
        self.fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: Final = thread
        self._function: Final = function
        thread.watch(self.fd, self._fired)

    def _fired(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._function()

    def close(self) -> None:
        """Close it; the device must have been told before. The function does not run any more when this returns."""
        self._thread.unwatch(self.fd)
        os.close(self.fd)
