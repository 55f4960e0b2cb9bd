"""The wire of VNC: numbers and layouts of the RFB protocol, 3.3, 3.7 and 3.8 (RFC 6143). Everything is big-endian."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class RfbError(Exception):
    """A viewer has sent what cannot be; the text says what."""


#: 7.1.1. What we offer, and the minor numbers we speak; what else a viewer says is taken for 3.3, as the standard wants it.
GREETING: Final = b"RFB 003.008\n"
MINORS: Final = {b"RFB 003.008\n": 8, b"RFB 003.007\n": 7}
OLDEST: Final = 3


class Security(IntEnum):
    """Security types (7.1.2)."""

    INVALID = 0
    NONE = 1
    VNC = 2


#: SecurityResult (7.1.3).
OK: Final = struct.pack(">I", 0)
FAILED: Final = struct.pack(">I", 1)
CHALLENGE_SIZE: Final = 16


class ClientMessage(IntEnum):
    """What viewers send (7.5), by the first byte."""

    SET_PIXEL_FORMAT = 0
    SET_ENCODINGS = 2
    UPDATE_REQUEST = 3
    KEY_EVENT = 4
    POINTER_EVENT = 5
    CUT_TEXT = 6


#: After that byte.
PIXEL_FORMAT: Final = struct.Struct(">3xBBBBHHHBBB3x")
SET_ENCODINGS: Final = struct.Struct(">xH")
UPDATE_REQUEST: Final = struct.Struct(">BHHHH")
KEY_EVENT_SIZE: Final = 7
POINTER_EVENT_SIZE: Final = 5
CUT_TEXT: Final = struct.Struct(">3xI")


class Encoding(IntEnum):
    """How a rectangle's pixels are sent (7.7), and what a viewer can do besides (7.8)."""

    RAW = 0
    ZRLE = 16
    DESKTOP_SIZE = -223


#: Subencodings of a ZRLE tile (7.7.6): the pixels as they are, or one for all.
ZRLE_RAW: Final = b"\x00"
ZRLE_SOLID: Final = b"\x01"
ZRLE_TILE: Final = 64

_RECTANGLE: Final = struct.Struct(">HHHHi")
_UPDATE: Final = struct.Struct(">BxH")
_SERVER_INIT: Final = struct.Struct(">HH16sI")
_LENGTH: Final = struct.Struct(">I")


def reason(text: str) -> bytes:
    """Return a text with its length, as refusals have it."""
    data = text.encode("latin-1", "replace")
    return _LENGTH.pack(len(data)) + data


def server_init(width: int, height: int, pixel_format: bytes, name: str) -> bytes:
    """7.3.2."""
    data = name.encode()
    return _SERVER_INIT.pack(width, height, pixel_format, len(data)) + data


def update(rectangles: int) -> bytes:
    """Begin a FramebufferUpdate (7.6.1)."""
    return _UPDATE.pack(0, rectangles)


def rectangle(x: int, y: int, width: int, height: int, encoding: Encoding) -> bytes:
    """Begin a rectangle (7.6.1)."""
    return _RECTANGLE.pack(x, y, width, height, encoding)


def sized(data: bytes) -> bytes:
    """Return compressed data with its length."""
    return _LENGTH.pack(len(data)) + data
