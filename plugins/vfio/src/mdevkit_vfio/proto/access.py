"""Region access: REGION_READ, REGION_WRITE and REGION_WRITE_MULTI."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from mdevkit_vfio.proto.header import Buffer, Command, at_least, fixed, invalid

#: What an access begins with: offset, region, count.
ACCESS: Final = struct.Struct("=QII")
_MULTI = struct.Struct("=QII8s")
_COUNT = struct.Struct("=Q")

#: A whole REGION_READ, header included: the shape of almost every message a guest causes. Its reply begins alike.
READ: Final = struct.Struct("=HHIIIQII")


@dataclass(frozen=True, slots=True)
class Access:
    """The head of REGION_READ and REGION_WRITE, requests and replies: `count` bytes at `offset` of `region`."""

    offset: int
    region: int
    count: int

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return ACCESS.pack(self.offset, self.region, self.count)


def parse_region_read(payload: Buffer) -> Access:
    """Read the payload of REGION_READ."""
    fixed(Command.REGION_READ, payload, ACCESS.size)
    return Access(*ACCESS.unpack(payload))


def parse_region_write(payload: Buffer) -> tuple[int, int, int]:
    """Return offset, region and count of a REGION_WRITE; `count` bytes of data follow from byte 16 on.

    A tuple, since this is called for every write of a guest.
    """
    if len(payload) < ACCESS.size:
        at_least(Command.REGION_WRITE, payload, ACCESS.size)
    offset, region, count = ACCESS.unpack_from(payload)
    if len(payload) - ACCESS.size != count:
        raise invalid(Command.REGION_WRITE, f"{len(payload) - ACCESS.size} bytes of data for a count of {count}")
    return offset, region, count


def parse_region_data(command: Command, payload: Buffer) -> tuple[Access, memoryview]:
    """Read the payload of a REGION_WRITE or of the reply to a REGION_READ: exactly `count` bytes of data follow.

    The data is a view of `payload`, not a copy: a megabyte would stop other threads for a while.
    """
    at_least(command, payload, ACCESS.size)
    access = Access(*ACCESS.unpack_from(payload))
    data = memoryview(payload)[ACCESS.size :]
    if len(data) != access.count:
        raise invalid(command, f"{len(data)} bytes of data for a count of {access.count}")
    return access, data


class Write(NamedTuple):
    """One write of a WRITE_MULTI; `data` has 1 to 8 bytes."""

    region: int
    offset: int
    data: bytes


def pack_write_multi(writes: Sequence[Write]) -> bytes:
    """Return the payload of REGION_WRITE_MULTI."""
    return _COUNT.pack(len(writes)) + b"".join(_MULTI.pack(w.offset, w.region, len(w.data), w.data) for w in writes)


def parse_write_multi(payload: Buffer) -> Iterator[Write]:
    """Read the payload of REGION_WRITE_MULTI, which may be long: the writes come one by one.

    EINVAL for a wrong length at once, for a wrong write when it is reached.
    """
    at_least(Command.REGION_WRITE_MULTI, payload, _COUNT.size)
    (count,) = _COUNT.unpack_from(payload)
    fixed(Command.REGION_WRITE_MULTI, payload, _COUNT.size + count * _MULTI.size)
    return _writes(payload[_COUNT.size :])


def _writes(payload: Buffer) -> Iterator[Write]:
    for offset, region, size, data in _MULTI.iter_unpack(payload):
        if not 1 <= size <= len(data):
            raise invalid(Command.REGION_WRITE_MULTI, f"a write of {size} bytes does not fit its 8")
        yield Write(region, offset, data[:size])


def pack_write_multi_reply(count: int) -> bytes:
    """Return the reply to REGION_WRITE_MULTI: `count` writes were done."""
    return _COUNT.pack(count)


def parse_write_multi_reply(payload: Buffer) -> int:
    """Read the reply to REGION_WRITE_MULTI."""
    fixed(Command.REGION_WRITE_MULTI, payload, _COUNT.size)
    count: int = _COUNT.unpack(payload)[0]
    return count
