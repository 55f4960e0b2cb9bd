"""The C engine as Python sees it: the interface of ring.py, net.py and loop.py, on structures the C code works on.

Importing this module fails where the engine is not built; `mdevkit_virtio.engine` handles that. Calls release the GIL.
Thread rules are those of the Python engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from mdevkit_virtio.engine import _native  # type: ignore[attr-defined,unused-ignore]  # compiled, and perhaps absent
from mdevkit_virtio.layout import (
    MAX_BURST,
    MAX_TAKE,
    MAX_TAKE_PIECES,
    Fault,
    Feature,
    MoveCounters,
    MoveOptions,
    RingSetup,
    Used,
    VringBase,
    Wait,
)
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Piece
from mdevkit_virtio.ring import Chain

if TYPE_CHECKING:
    from mdevkit_virtio.engine import Mover, Ring

ffi: Final = _native.ffi
lib: Final = _native.lib

_MOST_MOVERS: Final = 256


class _Memory:
    """A memory table as the C code reads it. It does not hold the mappings: whoever uses it holds the table."""

    def __init__(self, table: MemoryTable) -> None:
        self._regions: Final = ffi.new("mv_region[]", max(len(table.regions), 1))
        for slot, region in zip(self._regions, table.regions, strict=False):
            slot.guest, slot.size, slot.host = region.guest, region.size, ffi.cast("uint8_t *", region.host)
        self.c: Final = ffi.new("mv_memory *", {"regions": self._regions, "count": len(table.regions)})


_memories: Final[WeakKeyDictionary[MemoryTable, _Memory]] = WeakKeyDictionary()


def _memory(table: MemoryTable) -> _Memory:
    memory = _memories.get(table)
    if memory is None:
        memory = _memories[table] = _Memory(table)
    return memory


def _c_log(log: DirtyLog | None) -> Any:
    return ffi.NULL if log is None else ffi.new("mv_log *", {"bits": ffi.cast("uint8_t *", log.host), "size": log.size})


class NativeRing:
    """One virtqueue, split or packed."""

    def __init__(self, setup: RingSetup) -> None:
        #: Holds the memory and the log that the structure points to.
        self.setup: Final = setup
        self._memory: Final = _memory(setup.table)
        self._log: Final = _c_log(setup.log)
        self._c: Final = ffi.new("mv_queue *")
        self._fill_in()
        self._chains: Final = ffi.new("mv_chain[]", MAX_TAKE)
        self._pieces: Final = ffi.new("mv_piece[]", MAX_TAKE_PIECES)

    def _fill_in(self) -> None:
        setup, c = self.setup, self._c
        c.memory, c.log, c.num = self._memory.c, self._log, setup.num
        for name, area in setup.areas._asdict().items():
            setattr(c, name, ffi.cast("uint8_t *", area.host))
        c.desc_guest, c.device_guest = setup.areas.desc.guest, setup.areas.device.guest
        c.packed = setup.packed
        c.event_idx = Feature.EVENT_IDX in setup.features
        c.indirect = Feature.INDIRECT_DESC in setup.features
        c.in_order = Feature.IN_ORDER in setup.features
        c.log_ring = setup.log_ring
        c.avail, c.used, c.avail_wrap, c.used_wrap = setup.base
        c.seen = c.looked = c.avail
        c.looked_wrap = c.avail_wrap
        c.kick_fd = c.call_fd = -1

    @property
    def c(self) -> Any:
        """The structure the C code works on."""
        return self._c

    @property
    def fault(self) -> Fault:
        """Why the ring is broken, or OK."""
        return Fault(self._c.fault)

    @property
    def fault_value(self) -> int:
        """The number that goes with `fault`."""
        return int(self._c.fault_value)

    @property
    def base(self) -> VringBase:
        """Where the ring would go on."""
        return VringBase(self._c.avail, self._c.used, bool(self._c.avail_wrap), bool(self._c.used_wrap))

    @property
    def inflight(self) -> int:
        """Slots taken and not given back."""
        return int(self._c.inflight)

    @property
    def kick_fd(self) -> int:
        """The eventfd the driver kicks, or -1; owned by whoever set it."""
        return int(self._c.kick_fd)

    @kick_fd.setter
    def kick_fd(self, fd: int) -> None:
        self._c.kick_fd = fd

    @property
    def call_fd(self) -> int:
        """The eventfd that signals the driver, or -1; owned by whoever set it."""
        return int(self._c.call_fd)

    @call_fd.setter
    def call_fd(self, fd: int) -> None:
        self._c.call_fd = fd

    @property
    def kicks(self) -> int:
        """Kicks that were drained."""
        return int(self._c.kicks)

    @kicks.setter
    def kicks(self, count: int) -> None:
        self._c.kicks = count

    @property
    def calls(self) -> int:
        """Signals to the driver."""
        return int(self._c.calls)

    @calls.setter
    def calls(self, count: int) -> None:
        self._c.calls = count

    def take(self, limit: int) -> list[Chain]:
        """As `PyRing.take`."""
        if self._c.fault:
            return []
        count = lib.mv_take(self._c, limit, self._chains, self._pieces)
        return self._chains_taken(count)

    def _chains_taken(self, count: int) -> list[Chain]:
        chains, start = [], 0
        for c in self._chains[0:count]:
            pieces = tuple(
                Piece(p.guest, int(ffi.cast("uintptr_t", p.host)), p.length) for p in self._pieces[start : start + c.pieces]
            )
            start += c.pieces
            inputs, outputs = pieces[: c.readable_pieces], pieces[c.readable_pieces :]
            chains.append(Chain(c.id, c.slots, inputs, outputs, c.readable, c.writable))
        return chains

    def complete(self, used: Sequence[Used]) -> bool:
        """As `PyRing.complete`."""
        if self._c.fault:
            return False
        return bool(lib.mv_complete(self._c, ffi.new("mv_used[]", [tuple(entry) for entry in used]), len(used)))

    def notify(self, wanted: bool) -> bool:
        """As `PyRing.notify`."""
        return not self._c.fault and bool(lib.mv_notify(self._c, wanted))


class NativeMover:
    """As `PyMover`."""

    def __init__(self, tx: NativeRing, rx: NativeRing | None, options: MoveOptions) -> None:
        self.tx: Final = tx
        self.rx: Final = rx
        self._c: Final = ffi.new("mv_mover *")
        c = self._c
        c.tx, c.rx = tx.c, ffi.NULL if rx is None else rx.c
        c.tx_header, c.rx_header = options.tx_header, options.rx_header
        c.mergeable, c.drop, c.keep_header = options.mergeable, options.drop or rx is None, options.keep_header
        c.wait = Wait.EMPTY

    @property
    def c(self) -> Any:
        """The structure the C code works on."""
        return self._c

    @property
    def wait(self) -> Wait:
        """Why the last burst ended."""
        return Wait(self._c.wait)

    @property
    def halted(self) -> bool:
        """Not moved by a loop any more, because a ring of it is broken."""
        return bool(self._c.halted)

    @halted.setter
    def halted(self, halted: bool) -> None:
        self._c.halted = halted

    @property
    def counters(self) -> MoveCounters:
        """What has been done so far; any thread may read it."""
        done = self._c.done
        return MoveCounters(done.frames, done.bytes, done.dropped, done.malformed, done.oversize)

    def move(self, limit: int = MAX_BURST) -> int:
        """As `PyMover.move`."""
        return int(lib.mv_move(self._c, limit))


class NativeLoop:
    """As `PyLoop`; `run` stays in C, without the GIL."""

    def __init__(self, movers: Sequence[NativeMover], *, spin_us: int = 50, burst: int = MAX_BURST) -> None:
        if len(movers) > _MOST_MOVERS:
            raise ValueError(f"a loop runs {_MOST_MOVERS} movers at most, not {len(movers)}")
        self.movers: Final = tuple(movers)
        self._stop_fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pointers: Final = ffi.new("mv_mover *[]", [mover.c for mover in movers])
        self._c: Final = ffi.new("mv_loop *")
        self._c.movers, self._c.count, self._c.burst = self._pointers, len(movers), burst
        self._c.spin_ns, self._c.stop_fd = spin_us * 1000, self._stop_fd

    @property
    def sleeps(self) -> int:
        """How often it went to sleep."""
        return int(self._c.sleeps)

    def run(self) -> bool:
        """As `PyLoop.run`."""
        if lib.mv_run(self._c):
            return False
        self._c.stop = 0
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._stop_fd)
        return True

    def stop(self) -> None:
        """Make `run` return; any thread."""
        # In this order, or `run` could return before the descriptor is written to, which would then stay ready and keep it awake.
        os.eventfd_write(self._stop_fd, 1)
        self._c.stop = 1

    def close(self) -> None:
        """Give the descriptors back; nobody may be in `run`."""
        os.close(self._stop_fd)


def _copy(
    table: MemoryTable, log: DirtyLog | None, pieces: Sequence[Piece], offset: int, data: bytes | bytearray, *, write: bool
) -> Fault:
    if not len(data):
        return Fault.OK
    array = ffi.new("mv_piece[]", [(p.guest, ffi.cast("uint8_t *", p.host), p.length) for p in pieces])
    # A `bytes` is only read from; the C function takes one pointer for both directions.
    memory = ffi.from_buffer("uint8_t[]", data)
    return Fault(lib.mv_copy(_memory(table).c, _c_log(log), array, offset, memory, len(data), write))


class NativeEngine:
    """The C code."""

    name: Final = "c"

    def ring(self, setup: RingSetup) -> NativeRing:
        """Return a ring."""
        return NativeRing(setup)

    def mover(self, tx: Ring, rx: Ring | None, options: MoveOptions) -> NativeMover:
        """Return a mover of rings of this engine."""
        return NativeMover(_ours(tx), None if rx is None else _ours(rx), options)

    def loop(self, movers: Sequence[Mover], *, spin_us: int = 50, burst: int = MAX_BURST) -> NativeLoop:
        """Return a loop over movers of this engine."""
        ours = [mover for mover in movers if isinstance(mover, NativeMover)]
        if len(ours) != len(movers):
            raise TypeError("a mover of another engine")
        return NativeLoop(ours, spin_us=spin_us, burst=burst)

    def read(self, table: MemoryTable, pieces: Sequence[Piece], offset: int, size: int) -> tuple[Fault, bytes]:
        """Copy out of a buffer; the caller has checked that it has the bytes."""
        data = bytearray(size)
        return _copy(table, None, pieces, offset, data, write=False), bytes(data)

    def write(self, table: MemoryTable, log: DirtyLog | None, pieces: Sequence[Piece], offset: int, data: bytes) -> Fault:
        """Copy into a buffer; the caller has checked that it fits."""
        return _copy(table, log, pieces, offset, data, write=True)


def _ours(ring: Ring) -> NativeRing:
    if not isinstance(ring, NativeRing):
        raise TypeError("a ring of another engine")
    return ring
