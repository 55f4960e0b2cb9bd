"""Numbers of the Linux sample (mvnet_loopback of the V12 series), and what our own cards offer beyond it."""

from __future__ import annotations

from typing import Final

from mdevkit_virtio.netspec import NetFeature

#: What the Linux sample offers.
LINUX_FEATURES: Final = NetFeature.ANY_LAYOUT | NetFeature.VERSION_1 | NetFeature.ACCESS_PLATFORM
#: What lets the device pass on frames whose checksums and segments are left to do.
OFFLOADS: Final = NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6
#: What can be offered, by default all but the offloads, which promise frames that never come.
FEATURES: Final = (
    LINUX_FEATURES
    | OFFLOADS
    | NetFeature.MTU
    | NetFeature.MAC
    | NetFeature.MRG_RXBUF
    | NetFeature.STATUS
    | NetFeature.INDIRECT_DESC
    | NetFeature.EVENT_IDX
    | NetFeature.RING_PACKED
    | NetFeature.IN_ORDER
    | NetFeature.ORDER_PLATFORM
)

#: Bytes of the sample's configuration, which ends with `duplex`.
LINUX_CONFIG_SIZE: Final = 17
