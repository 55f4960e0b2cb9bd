"""The thread of one display that waits for whoever looks: new connections, requests, and the time of the next look at the picture.

While nobody is connected it sleeps without a time limit. `run`, and `close`, come from any other thread; everything else from the
loop's own.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from mdevkit.errors import MdevError

T = TypeVar("T")
R = TypeVar("R")

#: Called with the ``EPOLL*`` events of a descriptor.
Handler = Callable[[int], None]
#: Called after each wait with the time (`time.monotonic`); returns when it wants to be called again at the latest, or None.
Tick = Callable[[float], float | None]


log = logging.getLogger("mdevkit.display")


class _Call:
    """A function that another thread waits for."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Final = function
        self._done: Final = threading.Event()
        self._error: BaseException | None = None

    def answer(self) -> None:
        """Call the function, on the loop's thread."""
        try:
            self._function()
        except Exception as error:
            log.debug("a call failed", exc_info=True)
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Wait for the end; raises what the function has raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Loop:
    """A thread that calls handlers, which must not block; EAGAIN when no thread can be started.

    What a handler raises is logged, and the loop goes on: those who look must not be able to end it.
    """

    def __init__(self, name: str) -> None:
        self._calls: Final[deque[_Call]] = deque()
        self._handlers: Final[dict[int, Handler]] = {}
        #: Called after each wait.
        self.ticks: Final[list[Tick]] = []
        self._closing = False
        self._epoll: Final = select.epoll()
        try:
            self._alarm: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._alarm, select.EPOLLIN)
        self._thread: Final = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._close_files()
            raise MdevError(errno.EAGAIN, f"{name}: no thread can be started: {error}") from error

    def run(self, function: Callable[[], None]) -> None:
        """Have the loop's thread call `function`, and wait until it has; raises what that raises."""
        call = _Call(function)
        self._calls.append(call)
        os.eventfd_write(self._alarm, 1)
        call.wait()

    def close(self) -> None:
        """End the thread and wait for it."""
        self._closing = True
        os.eventfd_write(self._alarm, 1)
        self._thread.join()
        self._close_files()

    def add(self, fd: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        """Call `handler` when `events` happen on `fd`."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on `fd`."""
        self._epoll.modify(fd, events)

    def discard(self, fd: int) -> None:
        """Forget `fd`, which is closed afterwards."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _run(self) -> None:
        limit: float | None = None
        while not self._closing:
            for fd, events in self._epoll.poll(limit):
                handler = self._handlers.get(fd)
                if handler is not None:
                    _guarded(handler, events)
            self._answer_calls()
            limit = self._tick()

    def _answer_calls(self) -> None:
        try:
            os.eventfd_read(self._alarm)
        except BlockingIOError:
            return
        while self._calls:
            self._calls.popleft().answer()

    def _tick(self) -> float | None:
        """Let everybody do what is due, and return the seconds until something is due again."""
        now = time.monotonic()
        due = [when for tick in self.ticks if (when := _guarded(tick, now)) is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _close_files(self) -> None:
        self._epoll.close()
        os.close(self._alarm)


def _guarded(function: Callable[[T], R], argument: T) -> R | None:
    try:
        return function(argument)
    except Exception:
        log.exception("a fault while a display was looked at")
        return None
