"""Where things are in a type 0 configuration header, and what their bits mean (PCI Local Bus Specification 3.0, 6.1, 6.2).

Constants only. Names follow Linux's include/uapi/linux/pci_regs.h without the ``PCI_`` prefix.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
STATUS: Final = 0x06
REVISION_ID: Final = 0x08
CLASS_PROG: Final = 0x09
CACHE_LINE_SIZE: Final = 0x0C
BASE_ADDRESS_0: Final = 0x10
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
CAPABILITY_LIST: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

#: Length of the header; capabilities start here at the earliest.
HEADER_SIZE: Final = 0x40
#: Where the part only PCI Express knows starts; capabilities of the list end here.
CONVENTIONAL_SIZE: Final = 0x100
EXTENDED_SIZE: Final = 0x1000


class Command(IntFlag):
    """The command register (6.2.2)."""

    IO = 0x0001
    MEMORY = 0x0002
    MASTER = 0x0004
    PARITY = 0x0040
    SERR = 0x0100
    INTX_DISABLE = 0x0400


class Status(IntFlag):
    """The status register (6.2.3); the error bits are cleared by writing 1."""

    INTERRUPT = 0x0008
    CAP_LIST = 0x0010
    DEVSEL_MEDIUM = 0x0200
    ERRORS = 0xF900


#: Type bits of a base address register (6.2.5.1).
BAR_IO: Final = 0x1
BAR_MEM64: Final = 0x4
BAR_PREFETCH: Final = 0x8

#: Capability ids (appendix H).
CAP_MSI: Final = 0x05
CAP_VENDOR: Final = 0x09
CAP_MSIX: Final = 0x11
