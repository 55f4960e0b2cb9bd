"""Which features a vhost-user frontend is offered, and which of them are the device's. Pure; any thread may call in.

Some bits are the transport's and never reach the device: logging, protocol features, and MQ for a device with several queue
pairs and no control queue, because a frontend has that itself. One is the device's and never reaches a frontend:
ACCESS_PLATFORM would announce IOTLB messages, which this backend does not do; a device that has it gets it set, since it
uses no memory but what it was given (`VirtioOps.set_map`), which is what the bit promises.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.netspec import NetFeature
from mdevkit_virtio.ops import VirtioOps
from mdevkit_virtio.vhost.proto import F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeature

#: The features of a device that may be offered: those of vhost-mdev's list, MQ, and IN_ORDER, which is younger than the list.
WHITELIST: Final = sum(NetFeature)

_PLATFORM: Final = int(NetFeature.ACCESS_PLATFORM)
_MQ: Final = int(NetFeature.MQ)

#: Protocol features offered for every device.
PROTOCOL: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)


@dataclass(frozen=True)
class Traits:
    """What a device is to its frontends, as long as it lives."""

    #: Feature bits of the device.
    features: int
    #: Queues in use: always an even number, receive and transmit.
    queues: int
    #: Whether it can log what it writes.
    logs: bool

    @classmethod
    def of(cls, ops: VirtioOps, *, logs: bool) -> Traits:
        """Ask a device. Queues beyond the last pair are for a control queue, which the frontend has itself."""
        count = 0
        while ops.get_vq_num_max(count) > 0:
            count += 1
        return cls(ops.get_features(), count - count % 2, logs)

    @property
    def offered(self) -> int:
        """What GET_FEATURES tells."""
        transport = F_PROTOCOL_FEATURES | (F_LOG_ALL if self.logs else 0) | (_MQ if self.queues > 2 else 0)
        return self.features & WHITELIST & ~_PLATFORM & ~_MQ | transport

    @property
    def protocol(self) -> int:
        """What GET_PROTOCOL_FEATURES tells."""
        return int(PROTOCOL | (ProtocolFeature.LOG_SHMFD if self.logs else 0))

    def for_device(self, acked: int) -> int:
        """Return what the device is told when a frontend sets `acked`; EINVAL for bits that were not offered."""
        extra = acked & ~self.offered
        if extra:
            raise MdevError(errno.EINVAL, f"features {extra:#x} are not offered")
        return (acked | _PLATFORM) & self.features & ~F_LOG_ALL & ~F_PROTOCOL_FEATURES
