"""Migration protocol v2: the table of arcs, streams that carry the whole state, and streams nobody should accept.

The table is that of vfio_mig_get_next_state (drivers/vfio/vfio_main.c), written down here once more: the suite must not ask
the code it checks what is right.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from random import Random
from typing import Final

from mdevkit_vfio.ops import MigrationOps, VfioOps
from mdevkit_vfio.uapi import MigrationFlag
from mdevkit_vfio.uapi import MigrationState as S

from mdevkit_testkit.suites.base import refused, tolerated
from mdevkit_testkit.suites.vfio.base import (
    Fingerprint,
    VfioBase,
    differences,
    fingerprint,
    needs,
    places,
    registers,
    scribble,
    volatile,
)

_STATES: Final = {
    "S": S.STOP,
    "R": S.RUNNING,
    "PC": S.PRE_COPY,
    "PCP": S.PRE_COPY_P2P,
    "SC": S.STOP_COPY,
    "RE": S.RESUMING,
    "RP": S.RUNNING_P2P,
    "-": S.ERROR,
}
#: Row: where the device is. Columns: where it shall go, in the order of `_STATES`. Cell: the next step; "-" is refused.
_TABLE: Final = """
    S    S  RP RP  RP  SC  RE RP
    R    RP R  PC  RP  RP  RP RP
    PC   R  R  PC  PCP PCP R  R
    PCP  RP RP PC  PCP SC  RP RP
    SC   S  S  -   -   SC  S  S
    RE   S  S  S   S   S   RE S
    RP   S  R  R   PCP S   S  RP
"""
_NEEDS: Final = {
    S.RUNNING_P2P: MigrationFlag.P2P,
    S.PRE_COPY: MigrationFlag.PRE_COPY,
    S.PRE_COPY_P2P: MigrationFlag.PRE_COPY | MigrationFlag.P2P,
}
_KNOWN: Final = tuple(state for state in S if state is not S.ERROR)


def _parse_table() -> dict[tuple[S, S], S]:
    table = {}
    for line in _TABLE.split("\n"):
        if words := line.split():
            for wanted, step in zip(_STATES.values(), words[1:], strict=False):
                table[_STATES[words[0]], wanted] = _STATES[step]
    return table


_NEXT: Final = _parse_table()


def supported(state: S, flags: MigrationFlag) -> bool:
    """Tell whether a device with `flags` knows a state."""
    needs = _NEEDS.get(state, MigrationFlag(0))
    return state is not S.ERROR and flags & needs == needs


def reachable(now: S, wanted: S, flags: MigrationFlag) -> bool:
    """Tell whether the kernel walks from `now` to `wanted`."""
    if wanted is S.ERROR or not supported(wanted, flags):
        return False
    while now is not wanted:
        now = _NEXT[now, wanted]
        while now is not S.ERROR and not supported(now, flags):
            now = _NEXT[now, wanted]
        if now is S.ERROR:
            return False
    return True


def save(migration: MigrationOps, chunk: int = 1 << 16) -> bytes:
    """Stop the device and return its STOP_COPY stream, read in pieces of `chunk` bytes; it is left in STOP."""
    migration.set_state(S.STOP_COPY)
    data = read_all(migration, chunk)
    migration.set_state(S.STOP)
    return data


def read_all(migration: MigrationOps, chunk: int = 1 << 16) -> bytes:
    """Read the outgoing stream to its end."""
    parts = []
    while part := migration.read(chunk):
        assert len(part) <= chunk, f"a read of {chunk} bytes of migration data returned {len(part)}"
        parts.append(part)
    return b"".join(parts)


def load(migration: MigrationOps, data: bytes, chunk: int = 1 << 16) -> None:
    """Load a stream, written in pieces of `chunk` bytes; the device is left in STOP."""
    migration.set_state(S.STOP)
    migration.set_state(S.RESUMING)
    for start in range(0, len(data), chunk):
        migration.write(data[start : start + chunk])
    migration.set_state(S.STOP)


class Migration(VfioBase):
    """Saving and loading devices."""

    @needs("migration")
    def test_every_arc_is_the_kernels(self, ops: VfioOps) -> None:
        """Checks that from each state exactly those states are reached that the kernel's table allows, others get EINVAL."""
        migration = _migration(ops)
        stream = save(migration)
        states = [state for state in _KNOWN if supported(state, migration.flags)]
        for now, wanted in product(states, S):
            ops.reset()
            assert migration.state is S.RUNNING, f"after RESET the migration state is {migration.state.name}"
            _enter(migration, now, stream)
            arc = f"{now.name} to {wanted.name}"
            if reachable(now, wanted, migration.flags):
                migration.set_state(wanted)
                assert migration.state is wanted, f"from {arc}: the state is {migration.state.name}"
            else:
                with refused(f"going from {arc}", errno.EINVAL):
                    migration.set_state(wanted)
        ops.reset()

    @needs("migration")
    def test_stop_copy_carries_the_whole_state(self, ops: VfioOps, make_ops: Callable[[], VfioOps]) -> None:
        """Checks that a device loaded with another's STOP_COPY stream reads like it, and saves the same stream again."""
        self._check_transfer(ops, make_ops, save)

    @needs("precopy")
    def test_pre_copy_carries_the_whole_state(self, ops: VfioOps, make_ops: Callable[[], VfioOps]) -> None:
        """Checks the same for a stream read while the device ran, by PRE_COPY, and after it was stopped."""
        paths = [[S.PRE_COPY]] + ([[S.PRE_COPY, S.PRE_COPY_P2P]] if _migration(ops).flags & MigrationFlag.P2P else [])
        for path in paths:
            self._check_transfer(ops, make_ops, partial(_save_early, path))

    @needs("migration")
    def test_stream_does_not_depend_on_the_pieces(self, ops: VfioOps) -> None:
        """Checks that a stream read or written in pieces of any size is the same stream."""
        migration = _migration(ops)
        scribble(ops, 1, registers(ops))
        whole = save(migration)
        assert whole, "the stream is empty"
        for chunk in (1, 7, 4096):
            if len(whole) // chunk < 1 << 16:
                assert save(migration, chunk) == whole, f"read in pieces of {chunk} bytes the stream is another one"
                load(migration, whole, chunk)
                assert save(migration) == whole, f"written in pieces of {chunk} bytes the stream loads another state"

    @needs("migration")
    def test_size_is_told(self, ops: VfioOps) -> None:
        """Checks that the device gives an estimate of its stream's length."""
        assert _migration(ops).data_size() > 0

    @needs("migration")
    def test_streams_are_closed_outside_their_states(self, ops: VfioOps) -> None:
        """Checks that reading is refused with EINVAL or ENODEV where nothing is saved, and writing where nothing is loaded."""
        migration = _migration(ops)
        stream = save(migration)
        for state in (state for state in _KNOWN if supported(state, migration.flags)):
            ops.reset()
            _enter(migration, state, b"")
            if state not in {S.STOP_COPY, S.PRE_COPY, S.PRE_COPY_P2P}:
                with refused(f"reading migration data in {state.name}", errno.EINVAL, errno.ENODEV):
                    migration.read(16)
            if state is not S.RESUMING:
                with refused(f"writing migration data in {state.name}", errno.EINVAL, errno.ENODEV):
                    migration.write(stream[:16])
        ops.reset()

    @needs("migration")
    def test_broken_streams_are_refused_without_effect(self, ops: VfioOps) -> None:
        """Checks that streams cut short, too long or of random bytes are refused and leave the device as it was."""
        migration = _migration(ops)
        scribble(ops, 2, registers(ops))
        stream = save(migration)
        loaded = self._loaded(ops, stream)
        moving = volatile(loaded, self._loaded(ops, stream))
        for what, broken in _broken(stream):
            ops.reset()
            load(migration, stream)
            with refused(f"a migration stream {what}"):
                load(migration, broken)
            found = differences(loaded, self._registers(ops), moving)
            assert not found, f"a migration stream {what} was refused, and yet {found}"
        ops.reset()
        assert migration.state is S.RUNNING, "RESET does not bring a device back that has refused a stream"

    @needs("migration")
    def test_mutated_streams_do_no_harm(self, ops: VfioOps) -> None:
        """Checks that a stream with a few bits changed is refused with an OSError or leaves a device that works."""
        migration = _migration(ops)
        scribble(ops, 3, registers(ops))
        stream = save(migration)
        for what, mutated in _mutated(stream):
            ops.reset()
            with tolerated(f"a migration stream {what}"):
                load(migration, mutated)
                save(migration)
                migration.set_state(S.RUNNING)
                fingerprint(ops.read, places(ops))
        ops.reset()
        load(migration, stream)
        assert save(migration) == stream, "after refused streams the device does not load a good one"

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _check_transfer(self, ops: VfioOps, make_ops: Callable[[], VfioOps], read: Callable[[MigrationOps], bytes]) -> None:
        source, other = _migration(ops), make_ops()
        target = _migration(other)
        ignored = volatile(self._registers(ops), self._registers(other))
        for seed in range(3):
            ops.reset()
            other.reset()
            scribble(ops, seed, registers(ops))
            stream = read(source)
            expected = save(source)
            load(target, stream)
            assert save(target) == expected, "the device that was loaded saves another stream than the one that was saved"
            found = differences(self._registers(ops), self._registers(other), ignored)
            assert not found, f"the stream does not carry everything: after the load {found}"

    @staticmethod
    def _registers(ops: VfioOps) -> Fingerprint:
        return fingerprint(ops.read, places(ops, registers(ops)))

    def _loaded(self, ops: VfioOps, stream: bytes) -> Fingerprint:
        """Return what a device reads that has just been loaded."""
        load(_migration(ops), stream)
        return self._registers(ops)


def _migration(ops: VfioOps) -> MigrationOps:
    assert ops.migration is not None
    assert ops.migration.flags & MigrationFlag.STOP_COPY, f"migration with flags {ops.migration.flags!r} lacks STOP_COPY"
    return ops.migration


def _enter(migration: MigrationOps, state: S, stream: bytes) -> None:
    """Bring a running device into a state; in RESUMING, with all of a stream written, so that it can leave again."""
    migration.set_state(state)
    assert migration.state is state, f"the state is {migration.state.name} after set_state({state.name})"
    if state is S.RESUMING:
        migration.write(stream)


def _save_early(path: list[S], migration: MigrationOps) -> bytes:
    migration.set_state(S.RUNNING)
    data = b""
    for state in [*path, S.STOP_COPY]:
        migration.set_state(state)
        data += read_all(migration, 16)
    migration.set_state(S.STOP)
    return data


def _broken(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield streams that must be refused."""
    for length in sorted({0, 1, len(stream) // 2, len(stream) - 1}):
        yield f"cut to {length} of {len(stream)} bytes", stream[:length]
    yield "with a byte too many", stream + b"\0"
    yield "of random bytes", Random(5).randbytes(len(stream))  # noqa: S311  (repeatable, not secret)


def _mutated(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield streams that may be refused or not."""
    random = Random(6)  # noqa: S311  (repeatable, not secret)
    for position in sorted({*range(min(32, len(stream))), *(random.randrange(len(stream)) for _ in range(32))}):
        for value in (0xFF, stream[position] ^ (1 << random.randrange(8))):
            yield f"whose byte {position} is {value:#04x}", stream[:position] + bytes([value]) + stream[position + 1 :]
