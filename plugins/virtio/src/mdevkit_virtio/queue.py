"""Virtqueues for vendors: checked buffers in batches, whatever the engine and the ring's format.

A vendor takes buffers, reads and writes them within their bounds, and gives them back; it never sees a ring. What a driver
does wrong comes back as `RingError`, and then the ring is broken until it is started again.

A queue belongs to one thread at a time. Starting, stopping and changing descriptors is for when nobody uses it: between two
calls of the vendor, or inside `DataThread.paused`.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.engine import Engine, Ring, load
from mdevkit_virtio.layout import MAX_TAKE, NO_FEATURES, Fault, Feature, RingError, RingSetup, Used, VringBase, locate
from mdevkit_virtio.loop import drain_kick
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Piece
from mdevkit_virtio.net import signal_driver
from mdevkit_virtio.ring import Chain


@dataclass(frozen=True)
class QueueConfig:
    """What a driver has set up: size, addresses, negotiated features, where to go on.

    Addresses are the guest's. `base` is as in SET_VRING_BASE.
    `log`: what is written is marked there; `log_ring`: what is written of the ring too.
    """

    num: int
    desc: int
    driver: int
    device: int
    features: Feature = NO_FEATURES
    base: int | None = None
    log: DirtyLog | None = None
    log_ring: bool = False


class Buffer:
    """One buffer of the driver's, valid until it is given back or its queue stops.

    Used later it is no danger, only of no use: the memory it is in stays mapped as long as it lives.
    """

    __slots__ = ("_chain", "_queue", "done", "setup", "written")

    def __init__(self, queue: Virtqueue, chain: Chain) -> None:
        self._queue = queue
        self._chain = chain
        #: The ring it comes from.
        self.setup = queue.setup
        self.done = False
        self.written = 0

    @property
    def readable(self) -> int:
        """Bytes the device may read."""
        return self._chain.readable

    @property
    def writable(self) -> int:
        """Bytes the device may write."""
        return self._chain.writable

    @property
    def chain(self) -> Chain:
        """What the engine took."""
        return self._chain

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes of the readable part from `offset` on, by default all; EINVAL beyond it, `RingError` if gone."""
        size = self.readable - offset if size is None else size
        _check_range(offset, size, self.readable, "readable")
        fault, data = self._queue.engine.read(self.setup.table, self._chain.inputs, offset, size)
        if fault:
            raise RingError(fault, 0, self._queue)
        return data

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write into the writable part from `offset` on; errors as `read`."""
        _check_range(offset, len(data), self.writable, "writable")
        fault = self._queue.engine.write(self.setup.table, self.setup.log, self._chain.outputs, offset, data)
        if fault:
            raise RingError(fault, 0, self._queue)


def _check_range(offset: int, size: int, room: int, kind: str) -> None:
    if offset < 0 or size < 0 or offset + size > room:
        raise MdevError(errno.EINVAL, f"{size} bytes at {offset} are not in the {room} {kind} bytes of the buffer")


class Virtqueue:
    """One queue of a device. `name` is how errors call it, e.g. ``queue 1``."""

    def __init__(self, name: str, engine: Engine | None = None) -> None:
        self.name: Final = name
        self.engine: Final = engine if engine is not None else load()
        self._ring: Ring | None = None
        self._setup: RingSetup | None = None
        self._in_order = False
        #: With IN_ORDER, what was taken and not given back, oldest first.
        self._order: deque[Buffer] = deque()
        self._kick_fd = -1
        self._call_fd = -1

    def __str__(self) -> str:
        return self.name

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self, table: MemoryTable, config: QueueConfig) -> None:
        """Begin to use a ring. EINVAL and EFAULT as `locate`; EBUSY if it runs already.

        A split ring goes on where its used index in guest memory says: a frontend may know less than that after one of us
        has been killed, and DPDK's sends 0. A driver that is further ahead than the ring is long breaks it at once.
        """
        if self._ring is not None:
            raise MdevError(errno.EBUSY, f"{self} runs already", self)
        packed = Feature.RING_PACKED in config.features
        areas = locate(table, config.num, config.desc, config.driver, config.device, packed=packed)
        base = self._find_base(table, config, areas.device)
        setup = RingSetup(table, areas, config.num, config.features, base, config.log, config.log_ring)
        self._setup, self._ring = setup, self.engine.ring(setup)
        self._ring.kick_fd, self._ring.call_fd = self._kick_fd, self._call_fd
        self._in_order = Feature.IN_ORDER in config.features

    def _find_base(self, table: MemoryTable, config: QueueConfig, device: Piece) -> VringBase:
        if Feature.RING_PACKED in config.features:
            base = VringBase() if config.base is None else VringBase.decode(config.base, packed=True)
            if max(base.avail, base.used) >= config.num:
                raise MdevError(errno.EINVAL, f"{self} of {config.num} descriptors cannot go on at {base.avail}/{base.used}", self)
            return base
        fault, data = self.engine.read(table, [device], 2, 2)
        if fault:
            raise RingError(fault, 0, self)
        return VringBase.decode(int.from_bytes(data, "little"), packed=False)

    def stop(self) -> VringBase:
        """Stop using the ring and return where to go on; a stopped queue answers with 0.

        Buffers not given back are forgotten and, if all before them have been given back, taken again by whoever goes on.
        """
        ring, self._ring = self._ring, None
        self._order.clear()
        if ring is None:
            return VringBase()
        base = ring.base
        return VringBase(base.used, base.used, base.used_wrap, base.used_wrap)

    @property
    def running(self) -> bool:
        """Whether it is started."""
        return self._ring is not None

    @property
    def ring(self) -> Ring:
        """The engine's ring, for movers; ENOTCONN while stopped."""
        if self._ring is None:
            raise MdevError(errno.ENOTCONN, f"{self} is not started", self)
        return self._ring

    @property
    def setup(self) -> RingSetup:
        """What it was last started with; ENOTCONN before."""
        if self._setup is None:
            raise MdevError(errno.ENOTCONN, f"{self} was never started", self)
        return self._setup

    @property
    def broken(self) -> RingError | None:
        """Why the ring is broken, or None."""
        if self._ring is None or not self._ring.fault:
            return None
        return RingError(self._ring.fault, self._ring.fault_value, self)

    def set_kick(self, fd: int) -> None:
        """Use `fd` as the eventfd the driver kicks, -1 for none; it stays the caller's."""
        self._kick_fd = fd
        if self._ring is not None:
            self._ring.kick_fd = fd

    def set_call(self, fd: int) -> None:
        """Use `fd` as the eventfd that signals the driver, -1 for none; it stays the caller's."""
        self._call_fd = fd
        if self._ring is not None:
            self._ring.call_fd = fd

    # -- buffers ---------------------------------------------------------------------------------------------------------

    def take(self, limit: int = MAX_TAKE) -> list[Buffer]:
        """Return the next buffers, `limit` or `MAX_TAKE` at most, in the order the driver made them available.

        None means that there are none. Raises `RingError` if the ring is broken.
        """
        ring = self.ring
        buffers = [Buffer(self, chain) for chain in ring.take(limit)]
        if not buffers:
            self._check(ring)
        if self._in_order:
            self._order.extend(buffers)
        return buffers

    def complete(self, *done: tuple[Buffer, int]) -> None:
        """Give buffers back, each with the number of bytes written to it from its start, and signal the driver if it wants that.

        With IN_ORDER a buffer is held until all taken before it have been given back. EINVAL for a buffer that is not out, or of
        another queue, or taken before this one was stopped, or a number beyond its size; `RingError` if the ring is broken.
        """
        ring = self.ring
        for buffer, written in done:
            if buffer.done or not 0 <= written <= buffer.writable:
                raise MdevError(
                    errno.EINVAL, f"{self}: a buffer given back twice, or with {written} bytes of {buffer.writable}", self
                )
            if buffer.setup is not self._setup:
                raise MdevError(errno.EINVAL, f"{self}: a buffer of another queue, or taken before it was stopped", self)
            buffer.done, buffer.written = True, written
        ready = self._in_sequence() if self._in_order else [buffer for buffer, _ in done]
        used = [Used(buffer.chain.id, buffer.written, buffer.chain.slots) for buffer in ready]
        if used:
            wanted = ring.complete(used)
            self._check(ring)
            if wanted:
                signal_driver(ring)

    def _in_sequence(self) -> Iterable[Buffer]:
        while self._order and self._order[0].done:
            yield self._order.popleft()

    def notify(self, wanted: bool) -> bool:
        """Ask the driver for kicks, or for none; true if buffers have become available before it could see that."""
        ring = self.ring
        more = ring.notify(wanted)
        self._check(ring)
        return more

    def drain_kick(self) -> None:
        """Empty the kick eventfd; never blocks."""
        drain_kick(self.ring)

    def _check(self, ring: Ring) -> None:
        if ring.fault is not Fault.OK:
            raise RingError(ring.fault, ring.fault_value, self)
