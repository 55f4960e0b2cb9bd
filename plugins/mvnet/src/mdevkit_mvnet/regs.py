"""Numbers of network devices (virtio 1.2, section 5.1) and of the Linux sample (drivers/vdpa/mvnet_loopback of the V12 series)."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from mdevkit_virtio.config import Field


class NetFeature(IntFlag):
    """Feature bits (5.1.3 and 6)."""

    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36


#: What the Linux sample offers.
LINUX_FEATURES: Final = NetFeature.ANY_LAYOUT | NetFeature.VERSION_1 | NetFeature.ACCESS_PLATFORM
#: What can be offered, by default all but what promises frames that never come (checksums and segments left to do).
FEATURES: Final = NetFeature(sum(NetFeature))
OFFLOADS: Final = NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6

#: VIRTIO_NET_S_LINK_UP (5.1.4).
LINK_UP: Final = 1

#: struct virtio_net_config (5.1.4) up to `duplex`, as long as the series' headers had it.
CONFIG: Final = (
    Field("mac", 0, 6),
    Field("status", 6, 2),
    Field("max_virtqueue_pairs", 8, 2),
    Field("mtu", 10, 2),
    Field("speed", 12, 4),
    Field("duplex", 16, 1),
)
CONFIG_SIZE: Final = 24
LINUX_CONFIG_SIZE: Final = 17

#: Unknown speed and duplex (5.1.4).
SPEED_UNKNOWN: Final = 0xFFFFFFFF
DUPLEX_UNKNOWN: Final = 0xFF

#: Bytes of the virtio-net header (5.1.6): with VERSION_1 or MRG_RXBUF, and without.
HEADER: Final = 12
SHORT_HEADER: Final = 10
