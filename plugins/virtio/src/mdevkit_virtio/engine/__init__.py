"""Which engine carries the traffic: the C one where it is built, else the Python one, with one interface.

`load` is the only way to an engine. Any thread may call it; what an engine makes has the thread rules written there.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Final, Protocol

from mdevkit.errors import MdevError

from mdevkit_virtio.layout import MAX_BURST, Fault, MoveCounters, MoveOptions, RingSetup, Used, VringBase, Wait
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Piece
from mdevkit_virtio.ring import Chain

#: Names an engine: `c`, `python`, or nothing for the best there is.
VARIABLE: Final = "MDEVKIT_ENGINE"

_HOW_TO_BUILD: Final = (
    "the C engine of mdevkit-virtio is not built ({reason}); the Python engine does its work, some 100 times slower. "
    "To build it, on Debian and Ubuntu: apt-get install gcc python3-dev; then, in the environment of mdevkit: "
    "pip install --force-reinstall --no-deps --no-binary mdevkit-virtio mdevkit-virtio, "
    "or in a checkout: python -m mdevkit_virtio.engine.build"
)


class Ring(Protocol):
    """One virtqueue, device side. Belongs to one thread at a time; the counters may be read by any."""

    #: The eventfds the driver kicks and is signalled with, or -1. They stay with whoever set them.
    kick_fd: int
    call_fd: int
    #: Kicks that were drained, and signals to the driver.
    kicks: int
    calls: int

    @property
    def fault(self) -> Fault:
        """Why the ring is broken, or OK. A broken ring does nothing any more."""
        ...

    @property
    def fault_value(self) -> int:
        """The number that goes with `fault`; `RingError` puts it into words."""
        ...

    @property
    def base(self) -> VringBase:
        """Where the ring would go on."""
        ...

    @property
    def inflight(self) -> int:
        """Slots taken and not given back."""
        ...

    def take(self, limit: int) -> list[Chain]:
        """Take up to `limit` buffers, `MAX_TAKE` at most. None: there are none, or `fault` says why the ring is broken."""
        ...

    def complete(self, used: Sequence[Used]) -> bool:
        """Give buffers back; true if the driver wants a signal for them."""
        ...

    def notify(self, wanted: bool) -> bool:
        """Ask the driver for kicks, or for none; true if buffers have become available before it could see that."""
        ...


class Mover(Protocol):
    """Moves frames from a transmit ring to a receive ring, with one copy. Belongs to one thread at a time."""

    #: Not moved by a loop any more, because a ring of it is broken.
    halted: bool

    @property
    def tx(self) -> Ring:
        """Where frames come from."""
        ...

    @property
    def rx(self) -> Ring | None:
        """Where they go; None drops them."""
        ...

    @property
    def wait(self) -> Wait:
        """Why the last burst ended."""
        ...

    @property
    def counters(self) -> MoveCounters:
        """What has been done so far; any thread may read it."""
        ...

    def move(self, limit: int = MAX_BURST) -> int:
        """Move up to `limit` frames and return how many transmit buffers were used up; signals the drivers if they want it."""
        ...


class Loop(Protocol):
    """Runs movers: while there are frames, then polling for a while, then asleep on kicks."""

    @property
    def sleeps(self) -> int:
        """How often it went to sleep."""
        ...

    def run(self) -> bool:
        """Run until `stop` (true) or until a mover has halted (false); one thread, again and again."""
        ...

    def stop(self) -> None:
        """Make `run` return, also one that has not begun; any thread."""
        ...

    def close(self) -> None:
        """Give the descriptors back; nobody may be in `run`."""
        ...


class Engine(Protocol):
    """Makes rings, movers and loops that fit each other, and copies to and from buffers."""

    @property
    def name(self) -> str:
        """`c` or `python`."""
        ...

    def ring(self, setup: RingSetup) -> Ring:
        """Return a ring that goes on at the setup's base."""
        ...

    def mover(self, tx: Ring, rx: Ring | None, options: MoveOptions) -> Mover:
        """Return a mover; TypeError for rings of another engine."""
        ...

    def loop(self, movers: Sequence[Mover], *, spin_us: int = 50, burst: int = MAX_BURST) -> Loop:
        """Return a loop over movers of this engine; `spin_us` is how long it polls without traffic before it sleeps."""
        ...

    def read(self, table: MemoryTable, pieces: Sequence[Piece], offset: int, size: int) -> tuple[Fault, bytes]:
        """Copy out of a buffer; the caller has checked that it has the bytes."""
        ...

    def write(self, table: MemoryTable, log: DirtyLog | None, pieces: Sequence[Piece], offset: int, data: bytes) -> Fault:
        """Copy into a buffer and mark that in the log; the caller has checked that it fits."""
        ...


def load(name: str | None = None) -> Engine:
    """Return an engine: the one named, else the one MDEVKIT_ENGINE names, else C, else Python.

    Falling back to Python warns once per process, with the commands that would build the C engine. ENOENT for a name
    there is none of, ENOTSUP if the C engine is demanded and not built.
    """
    wanted = name if name is not None else os.environ.get(VARIABLE, "")
    if wanted not in ("", "c", "python"):
        raise MdevError(errno.ENOENT, f"there is no engine {wanted!r} ({VARIABLE} may be c or python)")
    if wanted == "python":
        return _python_engine()
    try:
        return _c_engine()
    except ImportError as error:
        if wanted == "c":
            raise MdevError(errno.ENOTSUP, _HOW_TO_BUILD.format(reason=error)) from error
        _warn_once(str(error))
        return _python_engine()


@cache
def _c_engine() -> Engine:
    from mdevkit_virtio.engine.native import NativeEngine

    return NativeEngine()


@cache
def _python_engine() -> Engine:
    from mdevkit_virtio.engine.python import PythonEngine

    return PythonEngine()


_warned: Final = threading.Lock()


def _warn_once(reason: str) -> None:
    # A lock taken for good: the first thread warns, nobody ever does again.
    if _warned.acquire(blocking=False):
        warnings.warn(_HOW_TO_BUILD.format(reason=reason), RuntimeWarning, stacklevel=3)
