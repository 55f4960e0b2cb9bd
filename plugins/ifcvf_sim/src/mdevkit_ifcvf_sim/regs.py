"""Registers of an IFC VF function: where they are, what they mean.

It is a virtio 1.0 device on PCI (virtio 1.2, section 4.1.4) with a block of Intel's in BAR 4, in which the positions of the
rings are kept for live migration (Linux, drivers/vdpa/ifcvf/ifcvf_base.h). Offsets inside BARs are the card's to choose: a
driver finds them through the capabilities.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Final

# -- who it is (ifcvf_base.h; PCI ids of a modern virtio-net device) ---------------------------------------------------
VENDOR_ID: Final = 0x1AF4
DEVICE_ID: Final = 0x1041
SUBSYSTEM_VENDOR_ID: Final = 0x8086
SUBSYSTEM_ID: Final = 0x001A
CLASS_CODE: Final = 0x020000
#: Revision of a modern-only virtio device (4.1.2.1).
REVISION: Final = 1

# -- capabilities (4.1.4) ----------------------------------------------------------------------------------------------
CAP_VENDOR: Final = 0x09
#: Bytes of struct virtio_pci_cap; that of the notify area has its multiplier behind it.
CAP_SIZE: Final = 16


class Cfg(IntEnum):
    """cfg_type of a capability."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4


# -- BAR 0: the four areas ---------------------------------------------------------------------------------------------
BAR: Final = 0
BAR_SIZE: Final = 0x4000
COMMON_OFFSET: Final = 0x0000
ISR_OFFSET: Final = 0x1000
DEVICE_OFFSET: Final = 0x2000
NOTIFY_OFFSET: Final = 0x3000
#: Bytes between the doorbells of two queues.
NOTIFY_MULTIPLIER: Final = 4
#: Where the card tells which area: cfg_type to offset and length.
AREAS: Final = {
    Cfg.COMMON: (COMMON_OFFSET, 56),
    Cfg.NOTIFY: (NOTIFY_OFFSET, 0x1000),
    Cfg.ISR: (ISR_OFFSET, 1),
    Cfg.DEVICE: (DEVICE_OFFSET, 24),
}

# -- BAR 1: the MSI-X table --------------------------------------------------------------------------------------------
MSIX_BAR: Final = 1
MSIX_BAR_SIZE: Final = 0x1000
#: One for the configuration, one for each queue.
VECTORS: Final = 3
NO_VECTOR: Final = 0xFFFF
#: Keys for the events that have no vector, which no register holds.
NO_QUEUE_VECTOR: Final = -1
NO_CONFIG_VECTOR: Final = -2

# -- BAR 4: live migration (IFCVF_LM_BAR, IFCVF_LM_RING_STATE_OFFSET) --------------------------------------------------
LM_BAR: Final = 4
LM_BAR_SIZE: Final = 0x1000
LM_RING_STATE: Final = 0x20
LM_PAIR_SIZE: Final = 0x40

#: Queues: one pair in 2019.
QUEUES: Final = 2

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2


class CommonCfg(ctypes.LittleEndianStructure):
    """struct virtio_pci_common_cfg (4.1.4.3)."""

    _fields_ = (
        ("device_feature_select", ctypes.c_uint32),
        ("device_feature", ctypes.c_uint32),
        ("driver_feature_select", ctypes.c_uint32),
        ("driver_feature", ctypes.c_uint32),
        ("msix_config", ctypes.c_uint16),
        ("num_queues", ctypes.c_uint16),
        ("device_status", ctypes.c_uint8),
        ("config_generation", ctypes.c_uint8),
        ("queue_select", ctypes.c_uint16),
        ("queue_size", ctypes.c_uint16),
        ("queue_msix_vector", ctypes.c_uint16),
        ("queue_enable", ctypes.c_uint16),
        ("queue_notify_off", ctypes.c_uint16),
        ("queue_desc_lo", ctypes.c_uint32),
        ("queue_desc_hi", ctypes.c_uint32),
        ("queue_driver_lo", ctypes.c_uint32),
        ("queue_driver_hi", ctypes.c_uint32),
        ("queue_device_lo", ctypes.c_uint32),
        ("queue_device_hi", ctypes.c_uint32),
    )


#: Offset of a field to its name and size.
FIELDS: Final = {getattr(CommonCfg, name).offset: (name, getattr(CommonCfg, name).size) for name, *_ in CommonCfg._fields_}
#: Name of a field to its offset and size.
OFFSETS: Final = {name: (offset, size) for offset, (name, size) in FIELDS.items()}


def lm_offset(queue: int) -> int:
    """Return where in BAR 4 the ring state of a queue is: ``last_avail | last_used << 16``."""
    return LM_RING_STATE + queue // 2 * LM_PAIR_SIZE + queue % 2 * 4
