"""Frames that tell whether they got lost, late or damaged: a number, when they were sent, a pattern that follows from the number.

Laid out as (offsets in bytes): Ethernet header 0, with an EtherType for experiments so that no network stack reacts to it;
magic 14; run 18; number 22; nanoseconds of the sender's monotonic clock 30; pattern 38 to the end. Pure; any thread may call.
"""

from __future__ import annotations

import errno
import struct
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

#: IEEE 802 - Local Experimental Ethertype 1 (IEEE 802, 9.2.3).
ETHERTYPE: Final = 0x88B5
#: The magic of Linux's pktgen (net/core/pktgen.c, PKTGEN_MAGIC).
MAGIC: Final = 0xBE9BE955
_HEADER: Final = struct.Struct(">6s6sHIIQQ")
#: Frames without their checksum have 60 bytes at least (IEEE 802.3, 3.2.8).
MIN_SIZE: Final = 60
_PERIOD: Final = 251
_PATTERN: Final = bytes(range(_PERIOD)) * (70000 // _PERIOD + 2)


class Seen(NamedTuple):
    """What a frame of ours says of itself, and whether its bytes are those that were sent."""

    number: int
    sent_ns: int
    intact: bool


class FrameMaker:
    """Makes and reads the frames of one run. `sizes` are used in turn."""

    def __init__(self, sizes: list[int], run: int, destination: bytes = b"\xff" * 6, source: bytes = b"\x02\0\0\0\0\x01") -> None:
        self.sizes: Final = sizes
        self._run: Final = run
        self._macs: Final = (destination, source)

    def make(self, number: int, now_ns: int) -> bytes:
        """Return frame `number`, sent now."""
        size = self.sizes[number % len(self.sizes)]
        start = number % _PERIOD
        header = _HEADER.pack(*self._macs, ETHERTYPE, MAGIC, self._run, number, now_ns)
        return header + _PATTERN[start : start + size - _HEADER.size]

    def read(self, frame: bytes) -> Seen | None:
        """Return what a frame says; None for one that is not of this run."""
        if len(frame) < _HEADER.size:
            return None
        _, _, kind, magic, run, number, sent_ns = _HEADER.unpack_from(frame)
        if (kind, magic, run) != (ETHERTYPE, MAGIC, self._run):
            return None
        return Seen(number, sent_ns, frame == self.make(number, sent_ns))


def check_sizes(sizes: list[int], most: int) -> None:
    """Refuse sizes a device cannot carry: EINVAL."""
    for size in sizes:
        if not MIN_SIZE <= size <= most:
            raise MdevError(errno.EINVAL, f"frames of {size} bytes cannot be sent: {MIN_SIZE} to {most} are possible here")
