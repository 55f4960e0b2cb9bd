"""Migration protocol v2 (include/uapi/linux/vfio.h): the state machine and the data stream of one device.

The kernel's vfio core owns the table of arcs and each driver walks it (drivers/vfio/vfio_main.c,
vfio_mig_get_next_state); both halves are here, so that a vendor gives a save and a load function and nothing else. Called
by the driver from the thread of the client's connection.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from mdevkit.errors import MdevError, wrap

from mdevkit_vfio.uapi import MigrationFlag, MigrationState

Hook = Callable[[], None]

#: Position in an outgoing stream, and its length.
_POSITIONS: Final = struct.Struct("<QQ")

_ERROR: Final = MigrationState.ERROR
_STOP: Final = MigrationState.STOP
_RUNNING: Final = MigrationState.RUNNING
_STOP_COPY: Final = MigrationState.STOP_COPY
_RESUMING: Final = MigrationState.RESUMING
_RUNNING_P2P: Final = MigrationState.RUNNING_P2P
_PRE_COPY: Final = MigrationState.PRE_COPY
_PRE_COPY_P2P: Final = MigrationState.PRE_COPY_P2P

#: Flags a device needs to know a state; ERROR is known to nobody.
_NEEDS: Final = {
    _STOP: MigrationFlag.STOP_COPY,
    _RUNNING: MigrationFlag.STOP_COPY,
    _STOP_COPY: MigrationFlag.STOP_COPY,
    _RESUMING: MigrationFlag.STOP_COPY,
    _RUNNING_P2P: MigrationFlag.STOP_COPY | MigrationFlag.P2P,
    _PRE_COPY: MigrationFlag.STOP_COPY | MigrationFlag.PRE_COPY,
    _PRE_COPY_P2P: MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY,
}

#: Arcs a device really takes; every other change is a walk over these.
_COLUMNS: Final = (_STOP, _RUNNING, _PRE_COPY, _PRE_COPY_P2P, _STOP_COPY, _RESUMING, _RUNNING_P2P)
_ROWS: Final = {
    _STOP: (_STOP, _RUNNING_P2P, _RUNNING_P2P, _RUNNING_P2P, _STOP_COPY, _RESUMING, _RUNNING_P2P),
    _RUNNING: (_RUNNING_P2P, _RUNNING, _PRE_COPY, _RUNNING_P2P, _RUNNING_P2P, _RUNNING_P2P, _RUNNING_P2P),
    _PRE_COPY: (_RUNNING, _RUNNING, _PRE_COPY, _PRE_COPY_P2P, _PRE_COPY_P2P, _RUNNING, _RUNNING),
    _PRE_COPY_P2P: (_RUNNING_P2P, _RUNNING_P2P, _PRE_COPY, _PRE_COPY_P2P, _STOP_COPY, _RUNNING_P2P, _RUNNING_P2P),
    _STOP_COPY: (_STOP, _STOP, _ERROR, _ERROR, _STOP_COPY, _STOP, _STOP),
    _RESUMING: (_STOP, _STOP, _STOP, _STOP, _STOP, _RESUMING, _STOP),
    _RUNNING_P2P: (_STOP, _RUNNING, _RUNNING, _PRE_COPY_P2P, _STOP, _STOP, _RUNNING_P2P),
}
_NEXT: Final = {(now, _COLUMNS[i]): step for now, row in _ROWS.items() for i, step in enumerate(row)}

#: States in which the device runs, in which it may reach other devices, and which have an outgoing stream.
_RUNS: Final = frozenset({_RUNNING, _RUNNING_P2P, _PRE_COPY, _PRE_COPY_P2P})
_INITIATES: Final = frozenset({_RUNNING, _PRE_COPY})
_COPIES_EARLY: Final = frozenset({_PRE_COPY, _PRE_COPY_P2P})
_SAVES: Final = _COPIES_EARLY | {_STOP_COPY}


def next_state(now: MigrationState, wanted: MigrationState, flags: MigrationFlag) -> MigrationState:
    """Return the first state on the way from `now` to `wanted` for a device with `flags`; EINVAL if there is no way."""
    if not (_knows(now, flags) and _knows(wanted, flags)):
        raise _no_arc(now, wanted)
    step = _NEXT[now, wanted]
    while step is not _ERROR and not _knows(step, flags):
        step = _NEXT[step, wanted]
    if step is _ERROR:
        raise _no_arc(now, wanted)
    return step


def _knows(state: MigrationState, flags: MigrationFlag) -> bool:
    needs = _NEEDS.get(state)
    return needs is not None and flags & needs == needs


def _no_arc(now: MigrationState, wanted: MigrationState) -> MdevError:
    return MdevError(errno.EINVAL, f"migration cannot go from {now.name} to {wanted.name}")


class Migration:
    """Migration of a device whose whole state is a string of bytes of one length.

    `save` returns the state, the header included. `load` takes such a string and must check it before it changes anything:
    an OSError refuses it and the device stays as it was. `header`, needed for PRE_COPY, returns the first bytes of the
    stream, which do not change while the device runs; they are all that PRE_COPY offers. `check_header` gets the first bytes
    of an incoming stream as soon as they are there and may refuse them with an OSError (EFAULT is what the kernel's mtty
    uses). `size` returns the length of the stream in bytes; without it `save` is asked.

    `stop` and `resume` are told when the device must stand still (no interrupts, no DMA, no change of state) and when it
    goes on, as it does after `load`, here or in the process that follows one that has died: what the state says is under way is
    to be begun again. `quiesce` and `unquiesce`, for P2P, when it must not start DMA. `lock` is held around all of them; a
    `PciDevice` passes its own.

    An OSError from any of them leaves the state reached so far. Another exception is a bug: nobody can tell in which state the
    device is, so it goes to ERROR, which only a reset leaves.
    """

    def __init__(
        self,
        flags: MigrationFlag = MigrationFlag.STOP_COPY,
        *,
        save: Callable[[], bytes],
        load: Callable[[bytes], None],
        header: Callable[[], bytes] | None = None,
        check_header: Callable[[bytes], None] | None = None,
        size: Callable[[], int] | None = None,
        stop: Hook | None = None,
        resume: Hook | None = None,
        quiesce: Hook | None = None,
        unquiesce: Hook | None = None,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        if not flags & MigrationFlag.STOP_COPY:
            raise ValueError("migration without STOP_COPY is not possible")
        if flags & MigrationFlag.PRE_COPY and header is None:
            raise ValueError("PRE_COPY needs a header to offer")
        #: What the device can do.
        self.flags: MigrationFlag = flags
        self._save = save
        self._load = load
        self._header = header or bytes
        self._check_header = check_header
        self._size = size or (lambda: len(save()))
        self._hooks: Final[dict[str, Hook | None]] = {"stop": stop, "resume": resume, "quiesce": quiesce, "unquiesce": unquiesce}
        self._lock: AbstractContextManager[object] = nullcontext() if lock is None else lock
        self._state: MigrationState = _RUNNING
        self._outgoing: _Outgoing | None = None
        self._incoming: _Incoming | None = None
        # A stream that was there and is gone answers ENODEV, one that never was EINVAL.
        self._had_outgoing = self._had_incoming = False

    # -- MigrationOps -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> MigrationState:
        """The current state."""
        return self._state

    def set_state(self, wanted: MigrationState) -> None:
        """Walk to `wanted`; EINVAL for an arc that is refused or a stream cut short, else what the vendor raised."""
        with self._lock:
            # Wanting ERROR is refused by the table, also in ERROR.
            while self._state is not wanted or wanted is _ERROR:
                self._step(next_state(self._state, wanted, self.flags))

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes of the outgoing stream, b"" at its end; EINVAL without one, ENODEV once it is closed."""
        with self._lock:
            return self._reading().read(count)

    def write(self, data: bytes) -> None:
        """Append to the incoming stream; EINVAL without one, ENODEV once closed, ENOMEM beyond its length, or a bad header."""
        with self._lock:
            if self._incoming is None:
                raise _no_stream("incoming", closed=self._had_incoming)
            self._incoming.write(data)

    def data_size(self) -> int:
        """Return the length of the STOP_COPY stream in bytes."""
        with self._lock:
            return self._size()

    # -- beyond MigrationOps ----------------------------------------------------------------------------------------

    def precopy_info(self) -> tuple[int, int]:
        """Return (initial, dirty) bytes left to read in PRE_COPY (MIG_GET_PRECOPY_INFO); EINVAL in any other state."""
        with self._lock:
            if self._state not in _COPIES_EARLY:
                raise MdevError(errno.EINVAL, f"no pre-copy in migration state {self._state.name}")
            return self._reading().left, 0

    def reset(self) -> None:
        """Follow a reset of the device: RUNNING, whatever the state was, and no stream."""
        with self._lock:
            now, self._state = self._state, _RUNNING
            self._close_streams()
            if now not in _RUNS:
                self._notify("resume")
            if now not in _INITIATES:
                self._notify("unquiesce")

    # -- going on in another process --------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return the device's own state, as migration would."""
        return self._save()

    def load(self, state: bytes) -> None:
        """Take over what `save` has returned; errors are the vendor's."""
        self._load(state)

    def checkpoint(self) -> bytes:
        """Return the state reached and the streams under way; with the device's lock held."""
        outgoing, incoming = self._outgoing, self._incoming
        flags = (outgoing is not None) | (incoming is not None) << 1 | self._had_outgoing << 2 | self._had_incoming << 3
        if outgoing is None and incoming is None:
            return bytes((self._state, flags))
        return bytes((self._state, flags)) + (outgoing.checkpoint() if outgoing else b"") + (incoming.received if incoming else b"")

    def restore(self, state: bytes) -> None:
        """Go on from a checkpoint of the same device's, whose own state has been restored before; with the lock held."""
        self._state, flags = MigrationState(state[0]), state[1]
        self._had_outgoing, self._had_incoming = bool(flags & 4), bool(flags & 8)
        data = state[2:]
        self._close_streams()
        if flags & 1:
            self._outgoing, data = _Outgoing.restored(data)
        if flags & 2:
            self._incoming = _Incoming(self._size(), len(self._header()), self._check_header)
            self._incoming.write(data)
        if self._state in _RUNS and self._state not in _INITIATES:
            self._notify("quiesce")
        self._notify("resume" if self._state in _RUNS else "stop")

    # -- arcs -------------------------------------------------------------------------------------------------------

    def _step(self, step: MigrationState) -> None:
        try:
            self._take_arc(self._state, step)
        except OSError:
            raise
        except Exception as error:
            now, self._state = self._state, _ERROR
            self._close_streams()
            raise wrap(error, f"migration from {now.name} to {step.name}") from error
        self._state = step

    def _take_arc(self, now: MigrationState, step: MigrationState) -> None:
        if now is _RESUMING:
            self._finish_loading()
        elif now in _SAVES and step not in _SAVES:
            self._outgoing = None
        self._run_or_stop(now, step)
        try:
            self._open_streams(now, step)
        except OSError:
            if now in _RUNS and step not in _RUNS:
                self._notify("resume")
            raise

    def _run_or_stop(self, now: MigrationState, step: MigrationState) -> None:
        if (now in _RUNS) != (step in _RUNS):
            self._notify("resume" if step in _RUNS else "stop")
        elif step in _RUNS and (now in _INITIATES) != (step in _INITIATES):
            self._notify("unquiesce" if step in _INITIATES else "quiesce")

    def _open_streams(self, now: MigrationState, step: MigrationState) -> None:
        if step is _RESUMING:
            self._incoming = _Incoming(self._size(), len(self._header()), self._check_header)
            self._had_incoming = True
        elif step is _STOP_COPY:
            self._outgoing = _Outgoing(self._save(), self._outgoing)
            self._had_outgoing = True
        elif step in _COPIES_EARLY and now not in _COPIES_EARLY:
            self._outgoing = _Outgoing(self._header())
            self._had_outgoing = True

    def _finish_loading(self) -> None:
        if self._incoming is not None:
            self._load(self._incoming.whole())
        self._incoming = None

    def _notify(self, name: str) -> None:
        hook = self._hooks[name]
        if hook is not None:
            hook()

    def _reading(self) -> _Outgoing:
        if self._outgoing is None:
            raise _no_stream("outgoing", closed=self._had_outgoing)
        return self._outgoing

    def _close_streams(self) -> None:
        self._outgoing = None
        self._incoming = None


class _Outgoing:
    """The stream being read; a longer one takes the place of the part that PRE_COPY offered."""

    def __init__(self, data: bytes, before: _Outgoing | None = None) -> None:
        self._data: Final[bytes] = data
        if before is not None and not data.startswith(before._data):
            raise RuntimeError("the saved state does not begin with the header that was read before")
        self._position: int = before._position if before is not None else 0

    def checkpoint(self) -> bytes:
        """Return position and data."""
        return _POSITIONS.pack(self._position, len(self._data)) + self._data

    @classmethod
    def restored(cls, state: bytes) -> tuple[_Outgoing, bytes]:
        """Return the stream a checkpoint begins with, and what follows it."""
        position, size = _POSITIONS.unpack_from(state)
        end = _POSITIONS.size + size
        stream = cls(state[_POSITIONS.size : end])
        stream._position = position
        return stream, state[end:]

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._position

    def read(self, count: int) -> bytes:
        """Return the next bytes, at most `count`."""
        if count < 0:
            raise MdevError(errno.EINVAL, f"cannot read {count} bytes of migration data")
        data = self._data[self._position : self._position + count]
        self._position += len(data)
        return data


class _Incoming:
    """The stream being written, `size` bytes in all."""

    def __init__(self, size: int, header_size: int, check_header: Callable[[bytes], None] | None) -> None:
        self._size = size
        self._header_size = header_size
        self._check_header = check_header if header_size else None
        self._data = bytearray()

    @property
    def received(self) -> bytes:
        """What has come so far."""
        return bytes(self._data)

    def write(self, data: bytes) -> None:
        """Append; nothing is kept of a write that is refused."""
        if len(self._data) + len(data) > self._size:
            raise MdevError(errno.ENOMEM, f"more migration data than the {self._size} bytes this device takes")
        end = len(self._data) + len(data)
        if self._check_header is not None and end >= self._header_size:
            self._check_header(bytes(self._data + data)[: self._header_size])
            self._check_header = None
        self._data += data

    def whole(self) -> bytes:
        """Return the stream if it is complete."""
        if len(self._data) < self._size:
            raise MdevError(errno.EINVAL, f"migration data ends after {len(self._data)} of {self._size} bytes")
        return bytes(self._data)


def _no_stream(which: str, *, closed: bool) -> MdevError:
    if closed:
        return MdevError(errno.ENODEV, f"the {which} migration stream is closed")
    return MdevError(errno.EINVAL, f"there is no {which} migration stream in this state")
