"""Numbers of the VFIO user interface (include/uapi/linux/vfio.h), shared by devices, the server and the client.

Constants only; nothing here runs. Values and names are the kernel's without the ``VFIO_`` prefix.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final


class Device(IntFlag):
    """``VFIO_DEVICE_FLAGS_*`` of GET_INFO."""

    RESET = 1
    PCI = 2


class Region(IntEnum):
    """Indexes of a PCI device's regions (``VFIO_PCI_*_REGION_INDEX``)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


#: ``VFIO_PCI_NUM_REGIONS``: regions from here on are device specific.
PCI_NUM_REGIONS: Final = 9


class RegionFlag(IntFlag):
    """``VFIO_REGION_INFO_FLAG_*``."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class RegionCap(IntEnum):
    """``VFIO_REGION_INFO_CAP_*``."""

    SPARSE_MMAP = 1
    TYPE = 2


class Irq(IntEnum):
    """Indexes of a PCI device's interrupts (``VFIO_PCI_*_IRQ_INDEX``)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


#: ``VFIO_PCI_NUM_IRQS``.
PCI_NUM_IRQS: Final = 5


class IrqFlag(IntFlag):
    """``VFIO_IRQ_INFO_*``."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqSet(IntFlag):
    """``VFIO_IRQ_SET_*``: exactly one DATA and one ACTION bit make a valid request."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 0x10
    ACTION_TRIGGER = 0x20


IRQ_SET_DATA_MASK: Final = IrqSet.DATA_NONE | IrqSet.DATA_BOOL | IrqSet.DATA_EVENTFD
IRQ_SET_ACTION_MASK: Final = IrqSet.ACTION_MASK | IrqSet.ACTION_UNMASK | IrqSet.ACTION_TRIGGER


class Feature(IntEnum):
    """``VFIO_DEVICE_FEATURE_*`` numbers."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


FEATURE_MASK: Final = 0xFFFF
FEATURE_GET: Final = 1 << 16
FEATURE_SET: Final = 1 << 17
FEATURE_PROBE: Final = 1 << 18


class MigrationFlag(IntFlag):
    """``VFIO_MIGRATION_*``: what a device's migration can do."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class MigrationState(IntEnum):
    """``VFIO_DEVICE_STATE_*`` of migration protocol v2."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7
