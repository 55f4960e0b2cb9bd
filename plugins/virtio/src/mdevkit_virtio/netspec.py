"""What the standard says of network devices (virtio 1.2, section 5.1): for every device model and backend here."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from mdevkit_virtio.config import Field


class NetFeature(IntFlag):
    """Feature bits of a network device (5.1.3), and of every device (6), that can be offered."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    MQ = 1 << 22
    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SPEED_DUPLEX = 1 << 63


#: Queues of a device with one pair (5.1.2).
RX: Final = 0
TX: Final = 1

#: struct virtio_net_config (5.1.4) up to `duplex`, as long as the headers of the V12 series had it.
CONFIG_FIELDS: Final = (
    Field("mac", 0, 6),
    Field("status", 6, 2),
    Field("max_virtqueue_pairs", 8, 2),
    Field("mtu", 10, 2),
    Field("speed", 12, 4),
    Field("duplex", 16, 1),
)
CONFIG_SIZE: Final = 24
#: VIRTIO_NET_S_LINK_UP (5.1.4).
LINK_UP: Final = 1
#: Unknown speed and duplex (5.1.4).
SPEED_UNKNOWN: Final = 0xFFFFFFFF
DUPLEX_UNKNOWN: Final = 0xFF

#: MTUs of a network device (5.1.4.1); the least is IPv4's (RFC 791).
MIN_MTU: Final = 68
MAX_MTU: Final = 65535

#: Bytes of struct virtio_net_hdr (5.1.6), and without num_buffers, its last field, for a driver of before 1.0.
HEADER: Final = 12
LEGACY_HEADER: Final = 10
NUM_BUFFERS_AT: Final = LEGACY_HEADER
_LONG_HEADER: Final = int(NetFeature.VERSION_1 | NetFeature.MRG_RXBUF)


def header_size(accepted: int) -> int:
    """Return how many bytes are before each frame (5.1.6), by the features a driver has accepted."""
    return HEADER if accepted & _LONG_HEADER else LEGACY_HEADER
