"""Turns our pixels, 4 bytes each and blue first, into those a viewer asked for (RFC 6143, 7.4). Pure; any thread.

A picture has millions of pixels, so nothing here loops over them in Python: a byte of every pixel is taken at once by a slice,
looked up by `bytes.translate`, and put together with the others as one large number.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import Final

from mdevkit_mbochs.onlookers.rfb import RfbError

_LAYOUT: Final = struct.Struct(">BBBBHHHBBB3x")
_OURS: Final = 4
#: Where red, green and blue are in our pixels.
_CHANNELS: Final = (2, 1, 0)


@dataclass(frozen=True)
class PixelFormat:
    """Members as in the standard; ours by default."""

    bits: int = 32
    depth: int = 24
    big_endian: int = 0
    true_colour: int = 1
    red_max: int = 255
    green_max: int = 255
    blue_max: int = 255
    red_shift: int = 16
    green_shift: int = 8
    blue_shift: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> PixelFormat:
        """Take what a viewer sent (16 bytes); RfbError for a format that cannot be served."""
        made = cls(*_LAYOUT.unpack(data))
        if made.bits not in {8, 16, 32} or not made.true_colour:
            raise RfbError(f"pixels of {made.bits} bits{'' if made.true_colour else ' with a colour map'} are not served")
        for most, shift in made.channels:
            if most & (most + 1) or most << shift >= 1 << made.bits:
                raise RfbError(f"a colour of up to {most}, {shift} bits up, does not fit pixels of {made.bits} bits")
        return made

    def pack(self) -> bytes:
        """Return it as it is sent."""
        return _LAYOUT.pack(*astuple(self))

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """Largest value and shift of red, green and blue."""
        pairs = zip((self.red_max, self.green_max, self.blue_max), (self.red_shift, self.green_shift, self.blue_shift), strict=True)
        return tuple(pairs)


OURS: Final = PixelFormat()


class Converter:
    """Makes pixels of the format `wanted`. `compact_size` is the length of a CPIXEL (7.7.5)."""

    def __init__(self, wanted: PixelFormat) -> None:
        self.wanted: Final = wanted
        self._size: Final = wanted.bits // 8
        order = list(range(self._size))
        if wanted.big_endian:
            order.reverse()
        self._plain: Final = order == [0, 1, 2, 3] and wanted.channels == OURS.channels
        #: For each byte of a pixel, which of our bytes go into it, and as what.
        self._sources: Final = [self._source(wanted, byte) for byte in order]
        self._kept: Final = _compact(wanted, order)
        self.compact_size: Final = len(self._kept)

    @staticmethod
    def _source(wanted: PixelFormat, byte: int) -> list[tuple[int, bytes]]:
        tables = [
            (channel, bytes((value * most + 127) // 255 << shift >> 8 * byte & 0xFF for value in range(256)))
            for channel, (most, shift) in zip(_CHANNELS, wanted.channels, strict=True)
        ]
        return [(channel, table) for channel, table in tables if any(table)]

    def convert(self, pixels: bytes) -> bytes:
        """Return `pixels`, ours, in the wanted format."""
        return pixels if self._plain else self._pack(pixels, range(self._size))

    def compact(self, pixels: bytes) -> bytes:
        """Return `pixels`, ours, as CPIXELs of the wanted format."""
        return self._pack(pixels, self._kept)

    def _pack(self, pixels: bytes, kept: range | list[int]) -> bytes:
        packed = bytearray(len(pixels) // _OURS * len(kept))
        for place, byte in enumerate(kept):
            packed[place :: len(kept)] = pixels[byte::_OURS] if self._plain else _plane(pixels, self._sources[byte])
        return bytes(packed)


def _plane(pixels: bytes, sources: list[tuple[int, bytes]]) -> bytes:
    """Return one byte of every pixel."""
    size = len(pixels) // _OURS
    planes = [pixels[channel::_OURS].translate(table) for channel, table in sources]
    if len(planes) == 1:
        return planes[0]
    mixed = 0
    for plane in planes:
        mixed |= int.from_bytes(plane, "little")
    return mixed.to_bytes(size, "little")


def _compact(wanted: PixelFormat, order: list[int]) -> list[int]:
    """Return which bytes of a pixel make a CPIXEL: 3 of 4 if the colours fit into them, else all."""
    used = 0
    for most, shift in wanted.channels:
        used |= most << shift
    every = list(range(len(order)))
    if wanted.bits != 32 or wanted.depth > 24:
        return every
    unused = 3 if used < 1 << 24 else 0 if not used & 0xFF else None
    return [place for place in every if order[place] != unused]
