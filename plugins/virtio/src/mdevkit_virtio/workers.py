"""Who carries a device's traffic: workers, each with a thread of its own and some of the device's queues.

`MoverWorker` lets an engine move frames between queues and sees none of them; `BufferWorker` calls the vendor with queues that
have new buffers. A worker starts its thread when it first has a queue to serve. `VirtioModel` tells it what to serve, from
the driver's thread and inside `paused` only.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

from mdevkit.errors import MdevError, wrap

from mdevkit_virtio.datathread import DataThread
from mdevkit_virtio.engine import Engine, Mover
from mdevkit_virtio.layout import MoveCounters
from mdevkit_virtio.loop import UNKICKED_MS
from mdevkit_virtio.pausing import PausableThread
from mdevkit_virtio.queue import Virtqueue

_log: Final = logging.getLogger("mdevkit.virtio")

#: Queues that run, by index.
Queues = Mapping[int, Virtqueue]
#: Told, on the worker's thread, that a queue is broken and why.
OnBroken = Callable[[int, MdevError], None]


class Worker(ABC):
    """Serves the queues whose indexes are in `serves`. `on_broken` must not wait for another thread."""

    def __init__(self, name: str, serves: Iterable[int], on_broken: OnBroken) -> None:
        self.name = name
        self.serves: Final = frozenset(serves)
        self._on_broken: Final = on_broken

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """Stand still inside the block: no queue is in use. Blocks may nest; not on the worker's own thread."""

    @abstractmethod
    def update(self, queues: Queues) -> None:
        """Serve exactly these queues from now on; inside `paused`."""

    @abstractmethod
    def close(self) -> None:
        """End the thread; the worker is not used afterwards. Closing twice is harmless."""


class MoverWorker(Worker):
    """Frames move on a `DataThread` as `make_movers` says, which is called inside `paused` whenever the queues change."""

    def __init__(
        self,
        name: str,
        serves: Iterable[int],
        on_broken: OnBroken,
        *,
        engine: Engine,
        make_movers: Callable[[Queues], Sequence[Mover]],
        spin_us: int = 50,
    ) -> None:
        super().__init__(name, serves, on_broken)
        self._engine: Final = engine
        self._make_movers: Final = make_movers
        self._spin_us: Final = spin_us
        self._thread: DataThread | None = None
        self._queues: Queues = {}

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread, 0 as long as there is none; any thread."""
        return self._thread.native_id if self._thread is not None else 0

    def paused(self) -> AbstractContextManager[None]:
        """See `Worker.paused`."""
        return contextlib.nullcontext() if self._thread is None else self._thread.paused()

    def update(self, queues: Queues) -> None:
        """See `Worker.update`."""
        self._queues = queues
        movers = self._make_movers(queues)
        if self._thread is None and movers:
            self._thread = DataThread(self.name, self._engine, spin_us=self._spin_us, on_halt=self._halted)
            self._thread.set_movers(movers)
            self._thread.start()
        elif self._thread is not None:
            self._thread.set_movers(movers)

    def close(self) -> None:
        """See `Worker.close`."""
        if self._thread is not None:
            self._thread.close()

    def _halted(self, mover: Mover) -> None:
        """Tell which queues are broken; if none is, the engine itself has failed, which is logged already."""
        rings = (mover.tx, mover.rx)
        mine = {index: queue for index, queue in self._queues.items() if queue.ring in rings}
        broken = {index: queue.broken for index, queue in mine.items() if queue.broken is not None}
        for index in mine:
            if not broken or index in broken:
                self._on_broken(index, broken.get(index) or MdevError(errno.EIO, f"{self.name}: the engine failed", self))


class BufferWorker(PausableThread, Worker):
    """Calls ``on_buffers(index, queue)`` on its thread for each queue that has buffers which it has not seen yet.

    The vendor takes what it wants and may leave the rest; it is called again when there are more, or after `wake`. A ring that
    is broken (`RingError`), or a vendor that fails, breaks that queue alone. A pause waits for one call of the vendor.
    """

    def __init__(self, name: str, serves: Iterable[int], on_broken: OnBroken, on_buffers: Callable[[int, Virtqueue], None]) -> None:
        PausableThread.__init__(self, name)
        Worker.__init__(self, name, serves, on_broken)
        self._on_buffers: Final = on_buffers
        self._queues: dict[int, Virtqueue] = {}
        #: Indexes to look at; any thread adds.
        self._pending: set[int] = set()
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self, index: int) -> None:
        """Have `on_buffers` called for a queue, if it runs; any thread."""
        with self._state:
            if not self._closing:
                self._pending.add(index)
                os.eventfd_write(self._wake, 1)

    def update(self, queues: Queues) -> None:
        """See `Worker.update`."""
        with self._state:
            self._pending = set(queues)
        self._queues = dict(queues)
        if queues and not self.started:
            self.start()

    def _interrupt(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _call_fds(self) -> Iterable[int]:
        # A copy: the thread itself takes out a queue that breaks.
        return [queue.ring.call_fd for queue in list(self._queues.values()) if queue.running]

    def _release(self) -> None:
        os.close(self._wake)

    # -- on the thread -------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        with self._state:
            pending, self._pending = self._pending, set()
        for index in sorted(pending):
            if self._wanted:
                self._postpone(index)
            elif index in self._queues:
                self._serve(index, self._queues[index])
        if not self._wanted:
            self._sleep()

    def _postpone(self, index: int) -> None:
        with self._state:
            self._pending.add(index)

    def _serve(self, index: int, queue: Virtqueue) -> None:
        try:
            # Asked for before the vendor looks, a kick comes for whatever it does not find.
            queue.notify(True)
            before = queue.ring.base
            self._on_buffers(index, queue)
            # With EVENT_IDX the driver has to be asked again behind what was taken. What the vendor left it knows of.
            if queue.ring.base != before and queue.notify(True):
                self._postpone(index)
        except Exception as error:  # noqa: BLE001  # a bug of the vendor breaks one queue, and is reported like a broken ring
            del self._queues[index]
            if not isinstance(error, MdevError):
                _log.exception("%s: serving %s failed", self.name, queue)
            self._on_broken(index, wrap(error, f"serving {queue}", queue))

    def _sleep(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        fds = {index: queue.ring.kick_fd for index, queue in self._queues.items()}
        for fd in fds.values():
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        timeout = 0 if self._pending else UNKICKED_MS if -1 in fds.values() else None
        ready = {fd for fd, _ in poll.poll(timeout)}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        for index, fd in fds.items():
            if fd < 0 or fd in ready:
                self._queues[index].drain_kick()
                self._postpone(index)


def add_counters(first: MoveCounters, second: MoveCounters) -> MoveCounters:
    """Return the sum, item by item."""
    return MoveCounters(*(a + b for a, b in zip(first, second, strict=True)))
