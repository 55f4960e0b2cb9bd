"""The registers of the card, as its data sheet would list them: BAR 0, little-endian, 4 bytes each."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag

BAR_SIZE = 4096

#: What register ID reads.
IDENTITY = int.from_bytes(b"CRC1", "little")


class Reg(IntEnum):
    """Offsets in BAR 0."""

    ID = 0x00  # read-only: "CRC1"
    SERIAL = 0x04  # read-only: chosen when the device is created
    CONTROL = 0x08  # write-only, see Control
    STATUS = 0x0C  # see Status; DONE and ERROR are cleared by writing 1
    LENGTH = 0x10  # bytes to read, at most the type's limit
    ADDRESS_LOW = 0x14  # where they are in guest memory
    ADDRESS_HIGH = 0x18
    RESULT = 0x1C  # read-only: the CRC-32 of the last job


class Control(IntFlag):
    """Bits of CONTROL."""

    START = 1


class Status(IntFlag):
    """Bits of STATUS."""

    BUSY = 1
    DONE = 2
    ERROR = 4


class State(ctypes.LittleEndianStructure):
    """Everything a job depends on, in one structure of fixed layout: what migration carries."""

    _fields_ = (
        ("status", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("address_low", ctypes.c_uint32),
        ("address_high", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    )
