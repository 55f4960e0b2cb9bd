"""Virtqueues, device side, in plain Python: the reference the C engine is tested against, and its stand-in.

The driver is hostile. Every field is read once, into a local, and judged there; every loop is bounded by the ring's size;
every address goes through the memory table with its length. What is found wrong breaks the ring (`Fault`), and a broken
ring is not touched again.

A ring belongs to one thread at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from mdevkit_virtio import access
from mdevkit_virtio.layout import (
    LOG_PAGE_SHIFT,
    MAX_LENGTH,
    MAX_PIECES,
    MAX_TAKE,
    MAX_TAKE_PIECES,
    Desc,
    Event,
    Fault,
    Feature,
    RingSetup,
    Used,
    VringBase,
)
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Piece

_DESC: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_OWNERS: Final = int(Desc.AVAIL | Desc.USED)
_NEXT: Final = int(Desc.NEXT)
_WRITE: Final = int(Desc.WRITE)
_INDIRECT: Final = int(Desc.INDIRECT)
_AVAIL: Final = int(Desc.AVAIL)
_USED_FLAG: Final = int(Desc.USED)


class Chain(NamedTuple):
    """One buffer: what the device may read of it, then what it may write, and the sum of either in bytes.

    `slots` is the number of descriptors it takes in a packed ring, 1 in a split one.
    """

    id: int
    slots: int
    inputs: tuple[Piece, ...]
    outputs: tuple[Piece, ...]
    readable: int
    writable: int


class BrokenError(Exception):
    """A ring that turns out to be broken; inside the engine only."""

    def __init__(self, fault: Fault, value: int) -> None:
        super().__init__(fault, value)
        self.fault: Final = fault
        self.value: Final = value


@dataclass
class Cursor:
    """Where a burst stands before it is committed."""

    avail: int
    wrap: bool
    taken: int = 0

    def copy(self) -> Cursor:
        """Return a second one that starts here."""
        return Cursor(self.avail, self.wrap, self.taken)


class _Walk:
    """The chain that is being put together."""

    def __init__(self, table: MemoryTable) -> None:
        self._table: Final = table
        self.inputs: Final[list[Piece]] = []
        self.outputs: Final[list[Piece]] = []
        self.readable = 0
        self.writable = 0
        self._writing = False

    def add(self, address: int, length: int, flags: int) -> None:
        """Append one descriptor."""
        if flags & _WRITE:
            self._writing = True
        elif self._writing:
            raise BrokenError(Fault.ORDER, address)
        if self.readable + self.writable + length > MAX_LENGTH:
            raise BrokenError(Fault.LENGTH, address)
        if self._writing:
            self.writable += length
        else:
            self.readable += length
        self._add_pieces(address, length)

    def _add_pieces(self, address: int, length: int) -> None:
        pieces = self.outputs if self._writing else self.inputs
        while length:
            region = self._table.find(address)
            if region is None:
                raise BrokenError(Fault.ADDRESS, address)
            if len(self.inputs) + len(self.outputs) == MAX_PIECES:
                raise BrokenError(Fault.LENGTH, MAX_PIECES)
            offset = address - region.guest
            part = min(length, region.size - offset)
            pieces.append(Piece(address, region.host + offset, part))
            address += part
            length -= part

    def chain(self, identifier: int, slots: int) -> Chain:
        """Return what was put together."""
        return Chain(identifier, slots, tuple(self.inputs), tuple(self.outputs), self.readable, self.writable)


class PyRing:
    """One virtqueue. `PySplitRing` and `PyPackedRing` know the formats."""

    def __init__(self, setup: RingSetup) -> None:
        access.open_files()
        self.setup: Final = setup
        self.num: Final = setup.num
        self.table: Final = setup.table
        self.kick_fd = -1
        self.call_fd = -1
        self.kicks = 0
        self.calls = 0
        self.fault = Fault.OK
        self.fault_value = 0
        base = setup.base
        self.avail = base.avail
        self.used = base.used
        self.avail_wrap = base.avail_wrap
        #: Behind what is no reason to stay awake: what was taken, or found to be too little (`wait_behind`).
        self.looked = Cursor(base.avail, base.avail_wrap)
        self.used_wrap = base.used_wrap
        self.inflight = 0
        self._unsignalled = 0
        self._event_idx = Feature.EVENT_IDX in setup.features
        self._indirect = Feature.INDIRECT_DESC in setup.features
        self._in_order = Feature.IN_ORDER in setup.features

    # -- the interface both engines have -----------------------------------------------------------------------------

    @property
    def base(self) -> VringBase:
        """Where the ring would go on."""
        return VringBase(self.avail, self.used, self.avail_wrap, self.used_wrap)

    def take(self, limit: int) -> list[Chain]:
        """Take up to `limit` buffers, `MAX_TAKE` at most. None: there are none, or `fault` says why the ring is broken.

        A buffer that breaks the ring behind good ones is left for the next call.
        """
        if self.fault:
            return []
        cursor = self.cursor()
        try:
            chains = self.look_up(cursor, limit)
        except (BrokenError, access.TruncatedError) as error:
            self.breaks(error)
            return []
        self.commit(cursor)
        return chains

    def complete(self, used: Sequence[Used]) -> bool:
        """Give buffers back; true if the driver wants a signal for them."""
        if self.fault:
            return False
        try:
            self.publish(used)
            access.fence()
            return self.wants_signal()
        except (BrokenError, access.TruncatedError) as error:
            self.breaks(error)
            return False

    def notify(self, wanted: bool) -> bool:
        """Ask the driver for kicks, or for none; true if buffers have become available before it could see that."""
        if self.fault:
            return False
        try:
            if not wanted:
                self._refuse_kicks()
                return False
            self._want_kicks()
            # The driver publishes, then looks at our wish; we state it, then look for what was published.
            access.fence()
            return self._pending()
        except (BrokenError, access.TruncatedError) as error:
            self.breaks(error)
            return False

    # -- for movers --------------------------------------------------------------------------------------------------

    def cursor(self) -> Cursor:
        """Return where the next burst starts."""
        return Cursor(self.avail, self.avail_wrap)

    def look_up(self, cursor: Cursor, limit: int) -> list[Chain]:
        """Return buffers from the cursor on, and move it behind them.

        What is wrong with one behind good ones is left for the next call, which meets it first: `BrokenError`. Memory that is
        gone is `TruncatedError` at once.
        """
        chains: list[Chain] = []
        room = MAX_TAKE_PIECES
        while len(chains) < min(limit, MAX_TAKE) and room >= MAX_PIECES:
            try:
                chain = self.next(cursor)
            except BrokenError:
                if not chains:
                    raise
                break
            if chain is None:
                break
            self.step(cursor, chain.slots)
            chains.append(chain)
            room -= len(chain.inputs) + len(chain.outputs)
        return chains

    def step(self, cursor: Cursor, slots: int) -> None:
        """Move a cursor behind a buffer of `slots`."""
        cursor.taken += slots
        cursor.avail, cursor.wrap = self.moved_on(cursor.avail, cursor.wrap, slots)

    def moved_on(self, at: int, wrap: bool, slots: int) -> tuple[int, bool]:
        """Return the position behind `slots`; in a packed ring it laps, and then the wrap counter changes."""
        raise NotImplementedError

    def commit(self, cursor: Cursor) -> None:
        """Take what lies before the cursor."""
        self.avail = cursor.avail
        self.avail_wrap = cursor.wrap
        self.inflight += cursor.taken
        self.looked = cursor.copy()

    def wait_behind(self, cursor: Cursor) -> None:
        """Wait for buffers behind the cursor: those before it are there, and too few."""
        self.looked = cursor.copy()

    def breaks(self, error: BrokenError | access.TruncatedError) -> None:
        """Note why the ring is broken."""
        if isinstance(error, BrokenError):
            self.fault, self.fault_value = error.fault, error.value
        else:
            self.fault, self.fault_value = Fault.MEMORY, 0

    def next(self, cursor: Cursor) -> Chain | None:
        """Return the buffer at the cursor; `BrokenError`, or `TruncatedError`."""
        raise NotImplementedError

    def publish(self, used: Sequence[Used]) -> None:
        """Write used entries and make them visible."""
        if used:
            slots = sum(entry.slots for entry in used)
            self.inflight -= slots
            self._unsignalled += slots
            self._publish(used)

    def wants_signal(self) -> bool:
        """Whether the driver wants a signal for what was published; a full barrier must lie between."""
        count, self._unsignalled = self._unsignalled, 0
        return bool(count) and self._wants_signal(count)

    # -- the formats ---------------------------------------------------------------------------------------------------

    def _publish(self, used: Sequence[Used]) -> None:
        raise NotImplementedError

    def _wants_signal(self, count: int) -> bool:
        raise NotImplementedError

    def _want_kicks(self) -> None:
        raise NotImplementedError

    def _refuse_kicks(self) -> None:
        raise NotImplementedError

    def _pending(self) -> bool:
        raise NotImplementedError

    def _log_ring(self, area: Piece, offset: int, length: int) -> None:
        if self.setup.log is not None and self.setup.log_ring:
            mark_dirty(self.setup.log, area.guest + offset, length)

    def _indirect_table(self, address: int, length: int) -> tuple[int, int]:
        """Return address in our space and entries of an indirect table (2.7.5.3, 2.8.7): whole, in one region."""
        entries = length // 16
        if not self._indirect or length % 16 or not length or entries > self.num:
            raise BrokenError(Fault.INDIRECT, length)
        region = self.table.find(address)
        if region is None or region.guest + region.size - address < length:
            raise BrokenError(Fault.ADDRESS, address)
        return region.host + address - region.guest, entries


class PySplitRing(PyRing):
    """A split virtqueue (2.7)."""

    def __init__(self, setup: RingSetup) -> None:
        super().__init__(setup)
        self._desc = setup.areas.desc.host
        self._driver = setup.areas.driver.host
        self._device = setup.areas.device.host
        #: The driver's index when last looked at.
        self._seen = self.avail

    def next(self, cursor: Cursor) -> Chain | None:
        """Return the next buffer."""
        if cursor.avail == self._seen:
            index = self._avail_index()
            if index == cursor.avail:
                return None
            if (index - self.used) & 0xFFFF > self.num:
                raise BrokenError(Fault.INDEX, index)
            self._seen = index
        return self._walk(int.from_bytes(access.read(self._driver + 4 + 2 * (cursor.avail & (self.num - 1)), 2), "little"))

    def moved_on(self, at: int, wrap: bool, slots: int) -> tuple[int, bool]:
        """As `PyRing.moved_on`."""
        return (at + slots) & 0xFFFF, wrap

    def _avail_index(self) -> int:
        """Read the driver's index; a copy by the kernel may be torn, so until it comes the same twice."""
        data = access.read(self._driver + 2, 2)
        while (again := access.read(self._driver + 2, 2)) != data:
            data = again
        return int.from_bytes(data, "little")

    def _walk(self, head: int) -> Chain:
        walk = _Walk(self.table)
        table, entries, left, index = self._desc, self.num, self.num, head
        nested = False
        while True:
            if index >= entries:
                raise BrokenError(Fault.HEAD, index)
            if not left:
                raise BrokenError(Fault.LOOP, head)
            left -= 1
            address, length, flags, following = _DESC.unpack(access.read(table + 16 * index, 16))
            if flags & _INDIRECT:
                if nested or flags & _NEXT:
                    raise BrokenError(Fault.INDIRECT, length)
                table, entries = self._indirect_table(address, length)
                nested, left, index = True, entries, 0
                continue
            walk.add(address, length, flags)
            if not flags & _NEXT:
                return walk.chain(head, 1)
            index = following

    def _publish(self, used: Sequence[Used]) -> None:
        start = self.used & (self.num - 1)
        data = b"".join([_USED.pack(entry.id, entry.length) for entry in used])
        first = 8 * min(len(used), self.num - start)
        for at, part in ((4 + 8 * start, data[:first]), (4, data[first:])):
            if part:
                access.write(self._device + at, part)
                self._log_ring(self.setup.areas.device, at, len(part))
        self.used = (self.used + len(used)) & 0xFFFF
        # All at once: the buffers of one frame come back together (5.1.6.4.1). The flags before it are ours alone.
        access.store_word(self._device, access.read(self._device, 2) + self.used.to_bytes(2, "little"))
        self._log_ring(self.setup.areas.device, 0, 4)

    def _wants_signal(self, count: int) -> bool:
        if not self._event_idx:
            return not access.read(self._driver, 1)[0] & 1
        event = int.from_bytes(access.read(self._driver + 4 + 2 * self.num, 2), "little")
        return passed(event, self.used, count)

    def _want_kicks(self) -> None:
        if self._event_idx:
            self._write(4 + 8 * self.num, self.looked.avail.to_bytes(2, "little"))
        else:
            self._write(0, bytes(2))

    def _refuse_kicks(self) -> None:
        if not self._event_idx:
            self._write(0, b"\1\0")

    def _write(self, offset: int, data: bytes) -> None:
        # Flags are in their lower byte, and an avail event seen half-written is followed by a look at the ring.
        access.write(self._device + offset, data)
        self._log_ring(self.setup.areas.device, offset, len(data))

    def _pending(self) -> bool:
        return self._avail_index() != self.looked.avail


class PyPackedRing(PyRing):
    """A packed virtqueue (2.8)."""

    def __init__(self, setup: RingSetup) -> None:
        super().__init__(setup)
        self._desc = setup.areas.desc.host
        self._driver = setup.areas.driver.host
        self._device = setup.areas.device.host

    def next(self, cursor: Cursor) -> Chain | None:
        """Return the next buffer."""
        available = self._flags(cursor.avail)
        if not _is_available(available, cursor.wrap):
            return None
        walk = _Walk(self.table)
        slots, at = 0, cursor.avail
        while True:
            address, length, identifier, flags = _DESC.unpack(access.read(self._desc + 16 * at, 16))
            # The flags that said "available" are the ones that count; they are not read again.
            flags = flags if slots else available
            slots += 1
            if slots > self.num:
                raise BrokenError(Fault.LOOP, cursor.avail)
            if flags & _INDIRECT:
                if slots > 1 or flags & _NEXT:
                    raise BrokenError(Fault.INDIRECT, length)
                self._walk_table(walk, address, length)
                break
            walk.add(address, length, flags)
            if not flags & _NEXT:
                break
            at = 0 if at + 1 == self.num else at + 1
        if self.inflight + cursor.taken + slots > self.num:
            raise BrokenError(Fault.INDEX, cursor.avail)
        return walk.chain(identifier, slots)

    def moved_on(self, at: int, wrap: bool, slots: int) -> tuple[int, bool]:
        """As `PyRing.moved_on`."""
        at += slots
        return (at - self.num, not wrap) if at >= self.num else (at, wrap)

    def _flags(self, at: int) -> int:
        return int.from_bytes(access.read(self._desc + 16 * at + 14, 2), "little")

    def _walk_table(self, walk: _Walk, address: int, length: int) -> None:
        # Entries follow each other, and only WRITE counts (2.8.7).
        host, entries = self._indirect_table(address, length)
        for index in range(entries):
            entry_address, entry_length, _, flags = _DESC.unpack(access.read(host + 16 * index, 16))
            walk.add(entry_address, entry_length, flags & _WRITE)

    def _publish(self, used: Sequence[Used]) -> None:
        if self._in_order and not any(entry.length for entry in used):
            # The last of a batch stands for all, if there is no length to tell (2.8.9).
            used = [Used(used[-1].id, 0, sum(entry.slots for entry in used))]
        first: tuple[int, int] | None = None
        for entry in used:
            flags = (_OWNERS if self.used_wrap else 0) | (_WRITE if entry.length else 0)
            host = self._desc + 16 * self.used
            head = entry.length.to_bytes(4, "little") + entry.id.to_bytes(2, "little")
            if first is None:
                access.write(host + 8, head)
                first = (host, flags)
            else:
                access.write(host + 8, head + flags.to_bytes(2, "little"))
            self._log_ring(self.setup.areas.desc, 16 * self.used, 16)
            self.used, self.used_wrap = self.moved_on(self.used, self.used_wrap, entry.slots)
        if first is not None:
            self._reveal(*first)

    def _reveal(self, host: int, flags: int) -> None:
        """Write the flags of the first entry, which show all of them (2.8.21).

        AVAIL is in the lower byte and is as the driver left it; USED is in the upper one. So one byte is what shows.
        """
        access.write(host + 14, bytes((flags & 0xFF,)))
        access.write(host + 15, bytes((flags >> 8,)))
        self._log_ring(self.setup.areas.desc, host - self._desc + 14, 2)

    def _wants_signal(self, count: int) -> bool:
        where, flags = struct.unpack("<HH", access.read(self._driver, 4))
        flags &= 3
        if flags != Event.DESC or not self._event_idx:
            return bool(flags == Event.ENABLE)
        event = where & 0x7FFF
        if bool(where >> 15) != self.used_wrap:
            event -= self.num
        return passed(event, self.used, count)

    def _want_kicks(self) -> None:
        if self._event_idx:
            access.write(self._device, (self.looked.avail | self.looked.wrap << 15).to_bytes(2, "little"))
        self._set_events(Event.DESC if self._event_idx else Event.ENABLE)

    def _refuse_kicks(self) -> None:
        self._set_events(Event.DISABLE)

    def _set_events(self, event: Event) -> None:
        access.write(self._device + 2, event.to_bytes(2, "little"))
        self._log_ring(self.setup.areas.device, 0, 4)

    def _pending(self) -> bool:
        return _is_available(self._flags(self.looked.avail), self.looked.wrap)


def make_ring(setup: RingSetup) -> PyRing:
    """Return the ring for a setup."""
    return PyPackedRing(setup) if setup.packed else PySplitRing(setup)


def passed(event: int, now: int, count: int) -> bool:
    """Whether `event` lies among the `count` indexes that end before `now`, modulo 2^16 (2.7.7.2)."""
    return count > 0xFFFF or (now - event - 1) & 0xFFFF < count


def mark_dirty(log: DirtyLog, guest: int, length: int) -> None:
    """Set the bits of a range in a dirty log; the data must have been written before.

    Not atomic: a bit the reader clears between our read and our write comes back, which costs it a page and loses nothing.
    The log's lock keeps writers, the threads of other queue pairs, from losing each other's bits.
    """
    if not length:
        return
    for page in range(guest >> LOG_PAGE_SHIFT, ((guest + length - 1) >> LOG_PAGE_SHIFT) + 1):
        if page >> 3 >= log.size:
            raise BrokenError(Fault.LOG, page << LOG_PAGE_SHIFT)
        host = log.host + (page >> 3)
        with log.lock:
            access.write(host, bytes((access.read(host, 1)[0] | 1 << (page & 7),)))


def mark_pieces(log: DirtyLog | None, pieces: Sequence[Piece], offset: int, length: int) -> None:
    """Mark what has been written into a buffer, from byte `offset` of it on; without a log nothing is."""
    if log is None:
        return
    for piece in pieces:
        part = min(length, max(piece.length - offset, 0))
        mark_dirty(log, piece.guest + offset, part)
        offset = max(offset - piece.length, 0)
        length -= part


def _is_available(flags: int, wrap: bool) -> bool:
    """Whose a packed descriptor is (2.8.1)."""
    return bool(flags & _AVAIL) == wrap and bool(flags & _USED_FLAG) != wrap
