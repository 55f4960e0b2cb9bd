"""A virtqueue as its driver has it (struct virtqueue): the ring, the memory of its buffers, and the way to the device.

Buffers are made with the ring and used again and again. One of more than a page is described page by page, as a kernel's are;
where the device takes indirect descriptors, in a table of its own that is written once.

A queue belongs to whoever holds its driver's lock for it: nothing here locks.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

from mdevkit_virtio.driverside import DriverRing, GuestMemory, Segment, make_driver_ring
from mdevkit_virtio.layout import Feature, area_sizes, check_size

#: What one descriptor of a buffer covers at most.
PAGE: Final = 4096
#: Bytes of a descriptor.
DESCRIPTOR: Final = 16
#: Most memory that the rings and buffers of one device may take; larger rings are made shorter.
MAX_MEMORY: Final = 1 << 28


@dataclass(frozen=True)
class QueueRequest:
    """A queue a driver wants (struct virtqueue_info); without a name it is left out and takes no index of the device's.

    `callback` is called on the device's interrupt thread. `buffer_size` is the size in bytes of each of the queue's buffers;
    `writable` says that the device writes them.
    """

    name: str | None
    callback: Callable[[], None] | None = None
    buffer_size: int = 0
    writable: bool = False


class Slot(NamedTuple):
    """A buffer: where it is in guest memory, its size, and its indirect table (-1: none)."""

    address: int
    size: int
    table: int

    def segments(self, length: int) -> list[Segment]:
        """Return the first `length` bytes of it page by page."""
        end = self.address + length
        if length <= PAGE:
            return [Segment(self.address, length)]
        return [Segment(at, min(PAGE, end - at)) for at in range(self.address, end, PAGE)]


class DriverVirtqueue:
    """One queue. `free` are the buffers the device does not have."""

    def __init__(self, request: QueueRequest, index: int, ring: DriverRing, notify: Callable[[], None]) -> None:
        self.name: Final = request.name or ""
        #: The device's number of it.
        self.index: Final = index
        self.ring: Final = ring
        self.num: Final = ring.num
        #: Tells the device of new buffers, whether or not it wants that.
        self.notify: Final = notify
        self._writable: Final = request.writable
        self._indirect: Final = Feature.INDIRECT_DESC in ring.features
        self.free: Final = list(self._make_slots(request.buffer_size)) if request.buffer_size else []

    def __str__(self) -> str:
        return f"queue {self.name}"

    def _make_slots(self, size: int) -> Iterator[Slot]:
        memory, pages = self.ring.memory, -(-size // PAGE)
        for _ in range(slot_count(self.num, size, indirect=self._indirect)):
            table = memory.allocate(DESCRIPTOR * pages) if pages > 1 and self._indirect else -1
            yield Slot(memory.allocate(size, PAGE if pages > 1 else 16), size, table)

    def add(self, slot: Slot, length: int) -> None:
        """Give the first `length` bytes of a buffer to the device; `collect` returns it. It sees them at once, `kick` tells it."""
        segments = slot.segments(length)
        readable, writable = ([], segments) if self._writable else (segments, [])
        if slot.table >= 0 and len(segments) > 1:
            added = self.ring.add_indirect(readable, writable, slot, slot.table)
        else:
            added = self.ring.add(readable, writable, slot)
        if not added:
            raise MdevError(errno.ENOSPC, f"{self} has no descriptor left for a buffer of its own", self)

    def collect(self) -> list[tuple[Slot, int]]:
        """Return what has come back: buffers, and bytes written to each. EIO if the device gave back what it did not have."""
        try:
            return [(token, length) for token, length in self.ring.collect()]
        except (LookupError, ValueError) as error:
            raise MdevError(errno.EIO, f"{self}: the device gave back a buffer it did not have ({error!r})", self) from error

    def kick(self) -> None:
        """Tell the device of what was added, if it wants to know."""
        if self.ring.needs_kick():
            self.notify()

    def enable_signals(self) -> None:
        """Ask for an interrupt at the next buffer that comes back; look once more afterwards."""
        self.ring.want_signals(True)

    def disable_signals(self) -> None:
        """Ask for none; one may come nevertheless."""
        self.ring.want_signals(False)

    def bytes_at(self, address: int, size: int) -> bytes:
        """Return what is in the memory of a buffer."""
        return self.ring.memory.map[address : address + size]


def slot_count(num: int, size: int, *, indirect: bool) -> int:
    """Return how many buffers of a size a ring has descriptors for."""
    pages = -(-size // PAGE)
    return num if indirect else max(1, num // pages)


def memory_for(request: QueueRequest, num: int, align: int, features: Feature) -> int:
    """Return the bytes a queue with its buffers takes at most, gaps for alignment included; EINVAL for a ring that cannot be."""
    packed, indirect = Feature.RING_PACKED in features, Feature.INDIRECT_DESC in features
    check_size(num, packed=packed)
    total = sum(area_sizes(num, packed=packed)) + 4 * align
    if request.buffer_size:
        pages = -(-request.buffer_size // PAGE)
        gap = PAGE if pages > 1 else DESCRIPTOR
        one = request.buffer_size + gap + (DESCRIPTOR * (pages + 1) if pages > 1 and indirect else 0)
        total += slot_count(num, request.buffer_size, indirect=indirect) * one
    return total


def make_memory(requests: list[tuple[QueueRequest, int]], align: int, features: Feature) -> tuple[GuestMemory, list[int]]:
    """Return memory for queues of up to the given sizes and the sizes they get; ENOMEM if not even the shortest fit.

    As vring_create_virtqueue() does with may_reduce_num, sizes are halved until there is room.
    """
    sizes = [num for _, num in requests]
    while True:
        total = sum(memory_for(request, num, align, features) for (request, _), num in zip(requests, sizes, strict=True))
        if total <= MAX_MEMORY:
            # Pages nobody touches cost nothing.
            return GuestMemory(-(-total // PAGE) * PAGE, name="virtio"), sizes
        if max(sizes) < 2:
            raise MdevError(errno.ENOMEM, f"{total} bytes of rings and buffers are more than the {MAX_MEMORY} a device may have")
        sizes = [max(num // 2, 1) for num in sizes]


def make_queue(
    request: QueueRequest, index: int, num: int, memory: GuestMemory, align: int, features: Feature, notify: Callable[[], None]
) -> DriverVirtqueue:
    """Build ring and buffers in memory that `make_memory` made."""
    return DriverVirtqueue(request, index, make_driver_ring(memory, num, features, max(align, 16)), notify)
