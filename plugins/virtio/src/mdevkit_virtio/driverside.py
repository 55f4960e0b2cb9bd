"""The other side of a virtqueue: what a driver does. For tests, benchmarks, and drivers that live in this process.

The memory here is our own, sealed against resizing, so it is accessed directly; indexes and flags through views of their
width, which store them in one piece (`struct.pack_into` does not). Python has no fence: `mdevkit_virtio.access.fence` stands
where a driver needs one. A ring belongs to one thread at a time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from mdevkit.errors import MdevError

from mdevkit_virtio import access
from mdevkit_virtio.layout import NO_FEATURES, Desc, Event, Feature, area_sizes, check_size
from mdevkit_virtio.ring import passed

_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class GuestMemory:
    """Memory a device may be given: a sealed memfd, and an allocator that only goes forward.

    Address 0 of the guest is byte 0 of the file. The descriptor is closed with the last reference, or by `close`.
    """

    def __init__(self, size: int, *, sealed: bool = True, name: str = "guest") -> None:
        self.size: Final = size
        self.fd: Final = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._give_back: Final = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        if sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self.map: Final = mmap.mmap(self.fd, size)
        self.bytes: Final = memoryview(self.map)
        self._next = 0

    @property
    def host(self) -> int:
        """Where it is in our address space."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def allocate(self, size: int, alignment: int = 16) -> int:
        """Return the guest address of `size` unused bytes; ENOMEM if there are not as many left."""
        start = -(-self._next // alignment) * alignment
        if start + size > self.size:
            raise MdevError(errno.ENOMEM, f"{size} bytes do not fit into the {self.size} bytes of guest memory")
        self._next = start + size
        return start

    def close(self) -> None:
        """Close the descriptor; the mapping goes away with its last view."""
        self._give_back()


class Segment(NamedTuple):
    """A range of guest memory in a descriptor."""

    address: int
    length: int


class Completion(NamedTuple):
    """A buffer that came back: the token it was added with, and the bytes written into it."""

    token: Any
    length: int


class DriverRing:
    """One virtqueue, driver side, over areas it allocates itself. `make_driver_ring` knows the format.

    `alignment` of each area in bytes, 16 at least: a page's keeps what the device writes apart from all else.
    """

    def __init__(self, memory: GuestMemory, num: int, features: Feature = NO_FEATURES, alignment: int = 16) -> None:
        packed = Feature.RING_PACKED in features
        check_size(num, packed=packed)
        sizes = area_sizes(num, packed=packed)
        self.memory: Final = memory
        self.num: Final = num
        self.features: Final = features
        self.desc: Final = memory.allocate(sizes[0], alignment)
        self.driver: Final = memory.allocate(sizes[1], alignment)
        self.device: Final = memory.allocate(sizes[2], alignment)
        self.free = num
        self._desc16: Final = memory.bytes[self.desc : self.desc + sizes[0]].cast("H")
        self._desc64: Final = memory.bytes[self.desc : self.desc + sizes[0]].cast("Q")
        self._driver16: Final = memory.bytes[self.driver : self.driver + sizes[1]].cast("H")
        self._device16: Final = memory.bytes[self.device : self.device + sizes[2]].cast("H")
        self._event_idx: Final = Feature.EVENT_IDX in features
        self._unkicked = 0

    def add(self, readable: list[Segment], writable: list[Segment], token: object) -> bool:
        """Make a buffer available; false if the ring has no room for it. The device sees it at once."""
        raise NotImplementedError

    def add_indirect(self, readable: list[Segment], writable: list[Segment], token: object, table: int | None = None) -> bool:
        """As `add`, in one descriptor that points to a table: the one at `table`, or a new one in guest memory."""
        segments = [(s, 0) for s in readable] + [(s, int(Desc.WRITE)) for s in writable]
        table = self.memory.allocate(16 * len(segments)) if table is None else table
        self._write_table(table, segments)
        return self._add([(Segment(table, 16 * len(segments)), int(Desc.INDIRECT))], token)

    def collect(self) -> list[Completion]:
        """Return what has come back since the last call."""
        raise NotImplementedError

    @property
    def outstanding(self) -> int:
        """Buffers that were added and not collected."""
        raise NotImplementedError

    @property
    def completed(self) -> int:
        """How many `collect` would return now; looks, and writes nothing."""
        raise NotImplementedError

    def needs_kick(self) -> bool:
        """Whether the device wants to be told of what was added since the last call."""
        access.fence()
        count, self._unkicked = self._unkicked, 0
        return bool(count) and self._needs_kick(count)

    @property
    def kick_wanted(self) -> bool:
        """Whether the device asks for a kick for the next buffer, as it does when it goes to sleep."""
        raise NotImplementedError

    def want_signals(self, wanted: bool) -> None:
        """Ask the device for signals, with EVENT_IDX for one at the next buffer it gives back; look again afterwards."""
        raise NotImplementedError

    def _needs_kick(self, count: int) -> bool:
        raise NotImplementedError

    def _add(self, segments: list[tuple[Segment, int]], token: object) -> bool:
        raise NotImplementedError

    def _write_table(self, table: int, segments: list[tuple[Segment, int]]) -> None:
        raise NotImplementedError

    def _put(self, slot: int, address: int, length: int, third: int, fourth: int) -> None:
        """Write a descriptor in two stores; the last 16 bits of it become visible with the second."""
        self._desc64[2 * slot] = address
        self._desc64[2 * slot + 1] = length | third << 32 | fourth << 48


def _chain(readable: list[Segment], writable: list[Segment]) -> list[tuple[Segment, int]]:
    segments = [(s, 0) for s in readable] + [(s, int(Desc.WRITE)) for s in writable]
    last = len(segments) - 1
    return [(segment, flags | (int(Desc.NEXT) if i < last else 0)) for i, (segment, flags) in enumerate(segments)]


class SplitDriverRing(DriverRing):
    """A split virtqueue (virtio 1.2, 2.7)."""

    def __init__(self, memory: GuestMemory, num: int, features: Feature = NO_FEATURES, alignment: int = 16) -> None:
        super().__init__(memory, num, features, alignment)
        self._free: Final = list(range(num - 1, -1, -1))
        self._tokens: Final[dict[int, tuple[object, list[int]]]] = {}
        self._used = 0
        self._avail = 0
        device = memory.bytes[self.device : self.device + area_sizes(num, packed=False)[2]]
        self._used_elements: Final = device[4 : 4 + 8 * num].cast("I")

    def add(self, readable: list[Segment], writable: list[Segment], token: object) -> bool:
        """As `DriverRing.add`."""
        return self._add(_chain(readable, writable), token)

    def _add(self, segments: list[tuple[Segment, int]], token: object) -> bool:
        if len(segments) > self.free:
            return False
        slots = [self._free.pop() for _ in segments]
        for i, (segment, flags) in enumerate(segments):
            following = slots[i + 1] if i + 1 < len(slots) else 0
            self._put(slots[i], segment.address, segment.length, flags, following)
        self.free -= len(slots)
        self._tokens[slots[0]] = (token, slots)
        self._driver16[2 + self._avail % self.num] = slots[0]
        self._avail = (self._avail + 1) & 0xFFFF
        self._driver16[1] = self._avail
        self._unkicked += 1
        return True

    def _write_table(self, table: int, segments: list[tuple[Segment, int]]) -> None:
        last = len(segments) - 1
        for i, (segment, flags) in enumerate(segments):
            entry = struct.pack("<QIHH", *segment, flags | (int(Desc.NEXT) if i < last else 0), i + 1 if i < last else 0)
            self.memory.map[table + 16 * i : table + 16 * (i + 1)] = entry

    def collect(self) -> list[Completion]:
        """As `DriverRing.collect`."""
        done = []
        index = self._device16[1]
        while self._used != index:
            at = 2 * (self._used % self.num)
            head, length = self._used_elements[at], self._used_elements[at + 1]
            token, slots = self._tokens.pop(head)
            self._free.extend(reversed(slots))
            self.free += len(slots)
            done.append(Completion(token, length))
            self._used = (self._used + 1) & 0xFFFF
        return done

    @property
    def outstanding(self) -> int:
        """As `DriverRing.outstanding`."""
        return len(self._tokens)

    @property
    def completed(self) -> int:
        """As `DriverRing.completed`."""
        return (self._device16[1] - self._used) & 0xFFFF

    def _needs_kick(self, count: int) -> bool:
        if self._event_idx:
            return passed(self._device16[2 + 4 * self.num], self._avail, count)
        return not self._device16[0] & 1

    @property
    def kick_wanted(self) -> bool:
        """As `DriverRing.kick_wanted`."""
        if self._event_idx:
            return self._device16[2 + 4 * self.num] == self._avail
        return not self._device16[0] & 1

    def want_signals(self, wanted: bool) -> None:
        """As `DriverRing.want_signals`."""
        if not self._event_idx:
            self._driver16[0] = 0 if wanted else 1
        elif wanted:
            self._driver16[2 + self.num] = self._used
        access.fence()


class PackedDriverRing(DriverRing):
    """A packed virtqueue (virtio 1.2, 2.8)."""

    def __init__(self, memory: GuestMemory, num: int, features: Feature = NO_FEATURES, alignment: int = 16) -> None:
        super().__init__(memory, num, features, alignment)
        self._tokens: Final[dict[int, tuple[object, int]]] = {}
        self._ids: Final = list(range(num - 1, -1, -1))
        self._at, self._wrap = 0, True
        self._used, self._used_wrap = 0, True

    def add(self, readable: list[Segment], writable: list[Segment], token: object) -> bool:
        """As `DriverRing.add`."""
        return self._add(_chain(readable, writable), token)

    def _add(self, segments: list[tuple[Segment, int]], token: object) -> bool:
        if len(segments) > self.free:
            return False
        first, first_flags = self._at, 0
        identifier = self._ids.pop()
        for i, (segment, flags) in enumerate(segments):
            flags |= int(Desc.AVAIL) if self._wrap else int(Desc.USED)
            if i:
                self._put(self._at, segment.address, segment.length, identifier, flags)
            else:
                first_flags = flags
                self._desc64[2 * first] = segment.address
                self._desc64[2 * first + 1] = segment.length | identifier << 32 | self._desc16[8 * first + 7] << 48
            self._at += 1
            if self._at == self.num:
                self._at, self._wrap = 0, not self._wrap
        self._desc16[8 * first + 7] = first_flags
        self.free -= len(segments)
        self._tokens[identifier] = (token, len(segments))
        self._unkicked += len(segments)
        return True

    def _write_table(self, table: int, segments: list[tuple[Segment, int]]) -> None:
        for i, (segment, flags) in enumerate(segments):
            self.memory.map[table + 16 * i : table + 16 * (i + 1)] = struct.pack("<QIHH", *segment, 0, flags)

    def collect(self) -> list[Completion]:
        """As `DriverRing.collect`."""
        found = list(self._used_ids())
        done = []
        for identifier, length in found:
            token, slots = self._tokens.pop(identifier)
            self._ids.append(identifier)
            self.free += slots
            done.append(Completion(token, length))
            self._used, self._used_wrap = self._behind(self._used, self._used_wrap, slots)
        return done

    @property
    def outstanding(self) -> int:
        """As `DriverRing.outstanding`."""
        return len(self._tokens)

    @property
    def completed(self) -> int:
        """As `DriverRing.completed`."""
        return len(list(self._used_ids()))

    def _used_ids(self) -> Iterator[tuple[int, int]]:
        """Look through used descriptors and yield the id and the length of each buffer they stand for."""
        at, wrap = self._used, self._used_wrap
        waiting = list(self._tokens) if Feature.IN_ORDER in self.features else []
        while self._is_used(self._desc16[8 * at + 7], wrap):
            word = self._desc64[2 * at + 1]
            last = word >> 32 & 0xFFFF
            # With IN_ORDER all up to that one, in the order they were added (2.8.9).
            batch = waiting[: waiting.index(last) + 1] if waiting else [last]
            del waiting[: len(batch)]
            for identifier in batch:
                yield identifier, word & 0xFFFFFFFF
                at, wrap = self._behind(at, wrap, self._tokens[identifier][1])

    def _behind(self, at: int, wrap: bool, slots: int) -> tuple[int, bool]:
        return (at + slots, wrap) if at + slots < self.num else (at + slots - self.num, not wrap)

    def _is_used(self, flags: int, wrap: bool) -> bool:
        return bool(flags & Desc.AVAIL) == bool(flags & Desc.USED) == wrap

    def _needs_kick(self, count: int) -> bool:
        where, flags = self._device16[0], self._device16[1] & 3
        if flags != Event.DESC or not self._event_idx:
            return bool(flags == Event.ENABLE)
        event = where & 0x7FFF
        if bool(where >> 15) != self._wrap:
            event -= self.num
        return passed(event, self._at, count)

    @property
    def kick_wanted(self) -> bool:
        """As `DriverRing.kick_wanted`."""
        where, flags = self._device16[0], self._device16[1] & 3
        if flags != Event.DESC or not self._event_idx:
            return bool(flags == Event.ENABLE)
        return bool(where == self._at | self._wrap << 15)

    def want_signals(self, wanted: bool) -> None:
        """As `DriverRing.want_signals`."""
        if self._event_idx and wanted:
            self._driver16[0] = self._used | self._used_wrap << 15
        enabled = Event.DESC if self._event_idx else Event.ENABLE
        self._driver16[1] = enabled if wanted else Event.DISABLE
        access.fence()


def make_driver_ring(memory: GuestMemory, num: int, features: Feature = NO_FEATURES, alignment: int = 16) -> DriverRing:
    """Return a ring in the format the features say; EINVAL for a size that format does not allow."""
    return (PackedDriverRing if Feature.RING_PACKED in features else SplitDriverRing)(memory, num, features, alignment)
