"""The Python engine behind the interface of `mdevkit_virtio.engine`; thread rules are those of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mdevkit_virtio import access
from mdevkit_virtio.layout import MAX_BURST, Fault, MoveOptions, RingSetup
from mdevkit_virtio.loop import PyLoop
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Piece
from mdevkit_virtio.net import PyMover, gather, scatter
from mdevkit_virtio.ring import BrokenError, PyRing, make_ring, mark_pieces

if TYPE_CHECKING:
    from mdevkit_virtio.engine import Mover, Ring


class PythonEngine:
    """Plain Python."""

    name: Final = "python"

    def ring(self, setup: RingSetup) -> PyRing:
        """Return a ring."""
        return make_ring(setup)

    def mover(self, tx: Ring, rx: Ring | None, options: MoveOptions) -> PyMover:
        """Return a mover of rings of this engine."""
        return PyMover(_ours(tx), None if rx is None else _ours(rx), options)

    def loop(self, movers: Sequence[Mover], *, spin_us: int = 50, burst: int = MAX_BURST) -> PyLoop:
        """Return a loop over movers of this engine."""
        ours = [mover for mover in movers if isinstance(mover, PyMover)]
        if len(ours) != len(movers):
            raise TypeError("a mover of another engine")
        return PyLoop(ours, spin_us=spin_us, burst=burst)

    def read(self, table: MemoryTable, pieces: Sequence[Piece], offset: int, size: int) -> tuple[Fault, bytes]:  # noqa: ARG002  # for C
        """Copy out of a buffer; the caller has checked that it has the bytes."""
        try:
            return Fault.OK, gather(pieces, offset, size)
        except access.TruncatedError:
            return Fault.MEMORY, b""

    def write(self, table: MemoryTable, log: DirtyLog | None, pieces: Sequence[Piece], offset: int, data: bytes) -> Fault:  # noqa: ARG002
        """Copy into a buffer; the caller has checked that it fits."""
        try:
            scatter(pieces, offset, data)
            mark_pieces(log, pieces, offset, len(data))
        except access.TruncatedError:
            return Fault.MEMORY
        except BrokenError as error:
            return error.fault
        return Fault.OK


def _ours(ring: Ring) -> PyRing:
    if not isinstance(ring, PyRing):
        raise TypeError("a ring of another engine")
    return ring
