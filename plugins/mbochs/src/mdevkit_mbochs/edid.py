"""Makes and checks EDID, the data by which a monitor tells a card what it can show (VESA E-EDID A.2, release 1.4).

No client of vfio-user brings a monitor along, so a display here makes its own from three facts: the resolution it prefers, a name
and a serial number. Pure functions; call them on any thread.
"""

from __future__ import annotations

import math
import struct
from typing import Final

#: Length of a block in bytes; the first says in its byte 126 how many follow (3.1).
BLOCK: Final = 128
_HEADER: Final = bytes.fromhex("00ffffffffffff00")
_EXTENSIONS: Final = 126

#: The most pixels a side of a detailed timing can have (12 bits, 3.10.2), and the fewest a display here shows.
MOST: Final = 4095
LEAST: Final = 64

#: The maker: three letters (3.4.1); MDV is in nobody's name in the UEFI forum's list.
_MAKER: Final = "MDV"
_PRODUCT: Final = 0x0001
_YEAR: Final = 2019
_VERSION: Final = (1, 4)
#: Digital, 8 bits per colour, interface not defined (3.6.1).
_DIGITAL: Final = 0xA0
_GAMMA: Final = 120  # 2.2: (gamma - 1) * 100
#: sRGB is the default colour space, the first detailed timing is the native one (3.6.4).
_FEATURES: Final = 0x06
#: Where red, green, blue and white are on the CIE diagram, for sRGB (3.7).
_CHROMATICITY: Final = bytes.fromhex("ee91a3544c99260f5054")
#: Bits of the established timings (3.8) that are 4:3 and 60 Hz: byte, bit, width, height.
_ESTABLISHED: Final = ((0, 5, 640, 480), (0, 0, 800, 600), (1, 3, 1024, 768))
_UNUSED_STANDARD: Final = b"\x01\x01"

#: Descriptors that are no timing (3.10.3).
_SERIAL_TEXT, _RANGE_LIMITS, _NAME = 0xFF, 0xFD, 0xFC
_TEXT: Final = 13

_PIXELS_PER_MM: Final = 96 / 25.4
#: CVT 1.2 with reduced blanking, version 1: pixels and lines around the picture.
_H_BLANK, _H_FRONT, _H_SYNC = 160, 48, 32
_V_FRONT, _V_SYNC, _V_BLANK = 3, 6, 0.00046
#: In 10 kHz, of 16 bits.
_MOST_CLOCK: Final = 0xFFFF
_REFRESH: Final = 60


def generate(width: int, height: int, *, name: str, serial: int, limit: tuple[int, int] = (0, 0)) -> bytes:
    """Return one block for a monitor that prefers `width` x `height` pixels, each side `LEAST` to `MOST`.

    `name`: up to 13 characters of ASCII; `serial`: 32 bits. Common smaller modes are offered too, up to `limit` pixels a side if
    that is not 0. ValueError for what does not fit.
    """
    if not (LEAST <= width <= MOST and LEAST <= height <= MOST):
        raise ValueError(f"{width}x{height}: {LEAST} to {MOST} pixels each way are possible")
    millimetres = [min(0xFFF, round(pixels / _PIXELS_PER_MM)) for pixels in (width, height)]
    block = b"".join(
        (
            _HEADER,
            _identity(serial),
            bytes((_DIGITAL, *(min(255, max(1, size // 10)) for size in millimetres), _GAMMA, _FEATURES)),
            _CHROMATICITY,
            _established(width, height, limit),
            _UNUSED_STANDARD * 8,
            _detailed_timing(width, height, *millimetres),
            _descriptor(_NAME, _padded(name)),
            _descriptor(_SERIAL_TEXT, _padded(str(serial))),
            _range_limits(),
            b"\0",
        )
    )
    return block + bytes([checksum(block)])


def checksum(block: bytes) -> int:
    """Return the byte that makes the sum of a block's first 127 bytes and itself 0 modulo 256."""
    return -sum(block[: BLOCK - 1]) & 0xFF


def check(blob: bytes, most: int) -> None:
    """Raise ValueError if `blob` is no EDID a guest would take, or longer than `most` bytes; says what is wrong with it."""
    if not blob or len(blob) % BLOCK or len(blob) > most:
        raise ValueError(f"EDID has blocks of {BLOCK} bytes, here up to {most // BLOCK}; these are {len(blob)} bytes")
    if not blob.startswith(_HEADER):
        raise ValueError(f"EDID begins with {_HEADER.hex()}, not with {blob[: len(_HEADER)].hex()}")
    if blob[_EXTENSIONS] + 1 != len(blob) // BLOCK:
        raise ValueError(f"{len(blob) // BLOCK} blocks are there, {blob[_EXTENSIONS] + 1} are announced")
    for number in range(len(blob) // BLOCK):
        block = blob[number * BLOCK :][:BLOCK]
        if block[-1] != checksum(block):
            raise ValueError(f"the checksum of block {number} is {block[-1]:#04x}, and should be {checksum(block):#04x}")


def _identity(serial: int) -> bytes:
    letters = 0
    for letter in _MAKER:
        letters = letters << 5 | ord(letter) - ord("A") + 1
    return struct.pack(">H", letters) + struct.pack("<HIBB", _PRODUCT, serial, 0, _YEAR - 1990) + bytes(_VERSION)


def _established(width: int, height: int, limit: tuple[int, int]) -> bytes:
    """Offer the common modes that are not larger than the monitor and the card."""
    offered = bytearray(3)
    for index, bit, wide, high in _ESTABLISHED:
        if wide <= min(width, limit[0] or width) and high <= min(height, limit[1] or height):
            offered[index] |= 1 << bit
    return bytes(offered)


def _detailed_timing(width: int, height: int, wide_mm: int, high_mm: int) -> bytes:
    """Return the preferred mode (3.10.2), with the blanking of CVT and 60 Hz, or as many as the pixel clock allows."""
    total = width + _H_BLANK
    blank = max(_V_FRONT + _V_SYNC + 6, math.ceil(_V_BLANK * _REFRESH * height / (1 - _V_BLANK * _REFRESH)))
    clock = min(_MOST_CLOCK, round(total * (height + blank) * _REFRESH / 10000))
    return struct.pack(
        "<H16B",
        clock,
        width & 0xFF,
        _H_BLANK,
        width >> 8 << 4,
        height & 0xFF,
        blank & 0xFF,
        height >> 8 << 4 | blank >> 8,
        _H_FRONT,
        _H_SYNC,
        _V_FRONT << 4 | _V_SYNC,
        0,
        wide_mm & 0xFF,
        high_mm & 0xFF,
        wide_mm >> 8 << 4 | high_mm >> 8,
        0,
        0,
        0x1A,  # separate digital sync, horizontal positive, as CVT has it with reduced blanking
    )


def _descriptor(tag: int, body: bytes) -> bytes:
    return bytes((0, 0, 0, tag, 0)) + body


def _padded(text: str) -> bytes:
    """Return a text as descriptors have it: a line feed ends it, spaces follow."""
    data = text.encode("ascii")
    if len(data) > _TEXT:
        raise ValueError(f"{text!r} has {len(data)} characters, {_TEXT} are possible")
    return (data if len(data) == _TEXT else data + b"\n").ljust(_TEXT, b" ")


def _range_limits() -> bytes:
    """Accept every rate (3.10.3.3.1): 1 to 255 Hz and kHz, any pixel clock, and nothing but the limits (tag 1)."""
    return _descriptor(_RANGE_LIMITS, bytes((1, 255, 1, 255, 255, 1)) + b"\n" + b" " * 6)
