"""mbochs as guests and clients see it: ids, the registers in BAR 2, the EDID region.

The dispi registers are those of Bochs' VBE extension (QEMU, docs/specs/standard-vga.rst); the EDID region is VFIO's
(include/uapi/linux/vfio.h, VFIO_REGION_SUBTYPE_GFX_EDID).
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import Final

VENDOR_ID: Final = 0x1234
DEVICE_ID: Final = 0x1111

#: BAR 2: registers, all in memory.
MMIO: Final = 2
MMIO_SIZE: Final = 0x1000
#: The EDID blob shows in the first 1 KiB while the link is up; it can be read only.
EDID_SIZE: Final = 0x400
#: The first dispi register, and how many there are, 2 bytes each. Other accesses than 2 bytes are dropped and read 0.
DISPI: Final = 0x500
DISPI_COUNT: Final = 11


class Dispi(IntEnum):
    """Indexes of the dispi registers. All can be read and written."""

    ID = 0
    XRES = 1
    YRES = 2
    BPP = 3
    ENABLE = 4
    BANK = 5
    VIRT_WIDTH = 6
    VIRT_HEIGHT = 7
    X_OFFSET = 8
    Y_OFFSET = 9
    #: Video memory in units of 64 KiB.
    MEMORY_64K = 10


#: What ID reads after reset: version 5 of the interface.
IDENTITY: Final = 0xB0C5
MEMORY_UNIT: Final = 64 << 10


class Enable(IntFlag):
    """Bits of the register ENABLE."""

    ENABLED = 1
    GETCAPS = 2
    DAC_8BIT = 0x20
    LFB = 0x40
    NOCLEARMEM = 0x80


#: Pixels a side of a picture must have at least, and bits a pixel must have, for a plane to be shown.
LEAST: Final = 64
BITS_PER_PIXEL: Final = 32


#: The device-specific region through which a client brings a monitor's EDID: its index, its size, and where the blob is in it.
EDID_REGION: Final = 9
EDID_REGION_SIZE: Final = 0x1000
EDID_BLOB: Final = 0x800
#: Its type: VFIO_REGION_TYPE_GFX and VFIO_REGION_SUBTYPE_GFX_EDID.
EDID_TYPE: Final = (1, 1)


class EdidReg(IntEnum):
    """Offsets in the EDID region; 4 bytes each, in 4-byte accesses only."""

    OFFSET = 0
    MAX_SIZE = 4
    SIZE = 8
    MAX_XRES = 12
    MAX_YRES = 16
    LINK_STATE = 20


class Link(IntEnum):
    """Values of LINK_STATE."""

    UNSET = 0
    UP = 1
    DOWN = 2


class State(ctypes.LittleEndianStructure):
    """Everything a guest can read back except video memory and configuration space, in one structure of fixed layout."""

    dispi: ctypes.Array[ctypes.c_uint16]
    reserved: int
    edid_size: int
    link_state: int
    blob: ctypes.Array[ctypes.c_uint8]
    _fields_ = (
        ("dispi", ctypes.c_uint16 * DISPI_COUNT),
        ("reserved", ctypes.c_uint16),
        ("edid_size", ctypes.c_uint32),
        ("link_state", ctypes.c_uint32),
        ("blob", ctypes.c_uint8 * EDID_SIZE),
    )
