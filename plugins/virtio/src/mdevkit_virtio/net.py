"""Frames from a transmit queue to a receive queue in plain Python (virtio 1.2, 5.1.6): the C engine's reference and stand-in.

A burst writes into receive buffers first, commits last, and commits the receive side before the transmit side. So
whatever ends it (no room, a broken ring, memory that is gone), a frame is delivered once or not at all, and the side
that did nothing wrong is in order.

A mover belongs to one thread at a time; its counters may be read by any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Final, Protocol

from mdevkit_virtio import access
from mdevkit_virtio.layout import (
    MAX_BURST,
    MAX_FRAME,
    MAX_MERGE,
    Fault,
    MoveCounters,
    MoveOptions,
    Used,
    Wait,
)
from mdevkit_virtio.memory import MemoryTable, Piece
from mdevkit_virtio.netspec import NUM_BUFFERS_AT
from mdevkit_virtio.ops import signal_eventfd
from mdevkit_virtio.ring import BrokenError, Chain, Cursor, PyRing, mark_pieces


class Signalled(Protocol):
    """A ring, of whatever engine, as far as signalling its driver goes."""

    call_fd: int
    calls: int


class _Outcome(Enum):
    MOVED = 0
    NO_ROOM = 1
    TOO_LARGE = 2
    RING_BROKEN = 3


class PyMover:
    """Moves the frames of `tx` to `rx`; without an `rx` they are dropped, whatever the options say."""

    def __init__(self, tx: PyRing, rx: PyRing | None, options: MoveOptions) -> None:
        self.tx: Final = tx
        self.rx: Final = rx
        self.options: Final = options
        self.wait = Wait.EMPTY
        #: Not moved by a loop any more, because a ring of it is broken.
        self.halted = False
        self.counters = MoveCounters(0, 0, 0, 0, 0)
        # Of one burst: where the rings are, what is given back, receive buffers looked up and how far, frames to come.
        self._tx, self._rx = Cursor(0, True), Cursor(0, True)
        self._tx_used: list[Used] = []
        self._rx_used: list[Used] = []
        self._staged: deque[Chain] = deque()
        self._scan = self._ended = Cursor(0, True)
        self._frames = 0

    def move(self, limit: int = MAX_BURST) -> int:
        """Move up to `limit` frames and return how many transmit buffers were used up; `wait` says why it ended."""
        if self.tx.fault or (self.rx is not None and self.rx.fault):
            self.wait = Wait.BROKEN
            return 0
        before = self.counters
        self._tx_used, self._rx_used = [], []
        try:
            return self._burst(min(limit, MAX_BURST))
        except access.TruncatedError as error:
            self.counters = before
            self._lost_memory(error)
            return 0

    def _burst(self, limit: int) -> int:
        self._tx, self._rx = self.tx.cursor(), self.rx.cursor() if self.rx is not None else Cursor(0, True)
        self._staged, self._scan = deque(), self._rx.copy()
        try:
            chains = self.tx.look_up(self._tx.copy(), limit)
        except BrokenError as error:
            self.tx.breaks(error)
            self.wait = Wait.BROKEN
            return 0
        self.wait = Wait.MORE if chains else Wait.EMPTY
        for chain in chains:
            self._frames = len(chains) - len(self._tx_used)
            if len(self._rx_used) >= MAX_BURST or not self._move_frame(chain):
                break
            self.tx.step(self._tx, chain.slots)
            self._tx_used.append(Used(chain.id, 0, chain.slots))
        if self.wait is Wait.BROKEN and self._tx_used and self.rx is not None:
            # A fault met after good frames is left for the next burst, which meets it first.
            self.wait = Wait.MORE
            self.rx.fault, self.rx.fault_value = Fault.OK, 0
        if self._tx_used:
            self._commit()
        if self.wait is Wait.FULL and self.rx is not None:
            self.rx.wait_behind(self._ended)
        return 0 if self.wait is Wait.BROKEN else len(self._tx_used)

    def _move_frame(self, chain: Chain) -> bool:
        """Move one frame; false if the burst ends here without it, for the reason in `wait`."""
        if chain.readable <= self.options.tx_header:
            self._count(malformed=1)
            return True
        length = chain.readable - self.options.tx_header
        before = self._rx.copy()
        outcome = self._try_to_deliver(chain, length)
        if outcome is _Outcome.MOVED:
            self._count(frames=1, bytes_=length)
            return True
        # Buffers that were looked at are looked up anew.
        self._ended = self._scan
        self._rx, self._scan = before, before.copy()
        self._staged.clear()
        if outcome is _Outcome.TOO_LARGE:
            self._count(oversize=1)
        elif outcome is _Outcome.NO_ROOM and (self.options.drop or self.rx is None):
            self._count(dropped=1)
        else:
            self.wait = Wait.FULL if outcome is _Outcome.NO_ROOM else Wait.BROKEN
            return False
        return True

    def _try_to_deliver(self, chain: Chain, length: int) -> _Outcome:
        if length > MAX_FRAME:
            return _Outcome.TOO_LARGE
        if self.rx is None:
            return _Outcome.NO_ROOM
        try:
            return self._deliver(self.rx, chain, length)
        except BrokenError as error:
            self.rx.breaks(error)
            return _Outcome.RING_BROKEN

    def _next_buffer(self, rx: PyRing) -> Chain | None:
        """Return the next receive buffer; many are looked up together, as in C."""
        if not self._staged:
            self._staged.extend(rx.look_up(self._scan, self._frames))
        return self._staged.popleft() if self._staged else None

    def _deliver(self, rx: PyRing, chain: Chain, length: int) -> _Outcome:
        """Write a frame, behind a header, into receive buffers; their used entries join `_rx_used`.

        Bytes are copied in the same order and the same parts as in C: drivers may let their buffers overlap.
        """
        source = _Place(chain.inputs)
        header = source.peek(NUM_BUFFERS_AT) if self.options.keep_header else bytes(NUM_BUFFERS_AT)
        header += b"\1\0"[: self.options.rx_header - NUM_BUFFERS_AT]
        source.advance(self.options.tx_header)
        first: tuple[Piece, ...] = ()
        used: list[Used] = []
        while True:
            if len(used) == min(rx.num, MAX_MERGE):
                return _Outcome.TOO_LARGE
            buffer = self._next_buffer(rx)
            if buffer is None:
                return _Outcome.NO_ROOM
            if buffer.writable < len(header):
                raise BrokenError(Fault.BUFFER, buffer.writable)
            part = min(buffer.writable - len(header), length)
            if not self.options.mergeable and part < length:
                return _Outcome.TOO_LARGE
            first = first or buffer.outputs
            target = _Place(buffer.outputs)
            target.put(header)
            target.take_from(source, part)
            mark_pieces(rx.setup.log, buffer.outputs, 0, len(header) + part)
            used.append(Used(buffer.id, len(header) + part, buffer.slots))
            rx.step(self._rx, buffer.slots)
            header = b""
            length -= part
            if not length:
                break
        if len(used) > 1:
            scatter(first, NUM_BUFFERS_AT, len(used).to_bytes(2, "little"))
            mark_pieces(rx.setup.log, first, NUM_BUFFERS_AT, 2)
        self._rx_used += used
        return _Outcome.MOVED

    def _commit(self) -> None:
        pairs = [(self.tx, self._tx, self._tx_used)]
        if self.rx is not None and self._rx_used:
            pairs.insert(0, (self.rx, self._rx, self._rx_used))
        for ring, cursor, used in pairs:
            ring.commit(cursor)
            try:
                ring.publish(used)
            except BrokenError as error:
                ring.breaks(error)
                self.wait = Wait.BROKEN
        access.fence()
        for ring, _, _ in pairs:
            if ring.wants_signal():
                signal_driver(ring)

    def _count(self, *, frames: int = 0, bytes_: int = 0, dropped: int = 0, malformed: int = 0, oversize: int = 0) -> None:
        more = (frames, bytes_, dropped, malformed, oversize)
        self.counters = MoveCounters(*(a + b for a, b in zip(self.counters, more, strict=True)))

    def _lost_memory(self, error: access.TruncatedError) -> None:
        for ring in (self.tx, self.rx):
            if ring is not None and (_holds(ring.table, error.host) or _in_log(ring, error.host)):
                ring.breaks(error)
        self.wait = Wait.BROKEN


class _Place:
    """A position in the pieces of a buffer."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces: Final = pieces
        self._index = 0
        self._offset = 0

    def peek(self, size: int) -> bytes:
        """Return what follows, and stay."""
        return gather(self._pieces[self._index :], self._offset, size)

    def put(self, data: bytes) -> None:
        """Write `data` and go on behind it."""
        scatter(self._pieces[self._index :], self._offset, data)
        self.advance(len(data))

    def take_from(self, source: _Place, size: int) -> None:
        """Copy `size` bytes from another place to this; both go on."""
        while size:
            to, start = self._pieces[self._index], source._pieces[source._index]
            part = min(size, to.length - self._offset, start.length - source._offset)
            access.write(to.host + self._offset, access.read(start.host + source._offset, part))
            self.advance(part)
            source.advance(part)
            size -= part

    def advance(self, size: int) -> None:
        """Go on by `size` bytes."""
        self._offset += size
        while self._index < len(self._pieces) and self._offset >= self._pieces[self._index].length:
            self._offset -= self._pieces[self._index].length
            self._index += 1


def gather(pieces: Sequence[Piece], offset: int, size: int) -> bytes:
    """Return `size` bytes of a buffer from `offset` on; the caller has checked that it has them."""
    parts = []
    for piece in pieces:
        if offset >= piece.length:
            offset -= piece.length
            continue
        part = min(size, piece.length - offset)
        if not part:
            break
        parts.append(access.read(piece.host + offset, part))
        size -= part
        offset = 0
    return parts[0] if len(parts) == 1 else b"".join(parts)


def scatter(pieces: Sequence[Piece], offset: int, data: bytes) -> None:
    """Write `data` into a buffer from `offset` on; the caller has checked that it fits."""
    done = 0
    for piece in pieces:
        if offset >= piece.length:
            offset -= piece.length
            continue
        part = min(len(data) - done, piece.length - offset)
        if not part:
            break
        access.write(piece.host + offset, data[done : done + part])
        done += part
        offset = 0


def signal_driver(ring: Signalled) -> None:
    """Add 1 to the driver's eventfd, unless it is full: then a signal is pending anyway."""
    ring.calls += 1
    if ring.call_fd >= 0:
        signal_eventfd(ring.call_fd)


def _holds(table: MemoryTable, host: int) -> bool:
    return any(0 <= host - region.host < region.size for region in table.regions)


def _in_log(ring: PyRing, host: int) -> bool:
    return ring.setup.log is not None and 0 <= host - ring.setup.log.host < ring.setup.log.size
