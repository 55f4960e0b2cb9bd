"""The lock of one device, and the work that has to wait until it is free.

A device decides under its lock that an eventfd is to be signalled or a job to be run, but doing either there could block
everybody who needs the device. So the decision goes into an outbox, and whoever releases the lock for good delivers it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OutboxLock(Generic[T]):
    """A re-entrant lock, used with ``with`` alone. `deliver` gets each posted item, in order, with the lock free.

    Two threads may deliver at the same time; an item is delivered once.
    """

    __slots__ = ("_deliver", "_depth", "_lock", "_outbox", "leaving")

    def __init__(self, deliver: Callable[[T], None]) -> None:
        #: Called each time the lock is about to be released for good, still under it; must not raise.
        self.leaving: Callable[[], None] | None = None
        self._lock = threading.RLock()
        self._depth = 0
        self._deliver = deliver
        self._outbox: deque[T] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        depth = self._depth - 1
        if self.leaving is not None and not depth:
            self.leaving()
        self._depth = depth
        self._lock.release()
        if self._outbox and not depth:
            self._empty()

    def post(self, item: T) -> None:
        """Put `item` into the outbox; the caller holds the lock."""
        self._outbox.append(item)

    def _empty(self) -> None:
        while self._outbox:
            try:
                item = self._outbox.popleft()
            except IndexError:  # another thread was faster
                return
            self._deliver(item)
