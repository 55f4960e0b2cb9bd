"""A vfio-user client: use a device the way a hypervisor does, from a test, a notebook or a tool.

    from mdevkit_vfio.client import VfioUserClient

    with VfioUserClient.connect("/run/user/1000/mdevkit/....sock") as device:
        device.config.read_int(0, 2)          # vendor id
        device.region(0).write_int(3, 1, 0x80)
        memory = device.dma_map(0x10000, 0x4000)
        line, = device.arm(Irq.INTX)
        line.wait(timeout=1)

The modules: `device` is the client, `channel` the connection beneath it, `memory` the guest memory it offers.
"""

from mdevkit_vfio.client.channel import Channel, Reply
from mdevkit_vfio.client.device import Interrupt, MigrationClient, RegionClient, VfioUserClient, migrate
from mdevkit_vfio.client.memory import GuestMemory

__all__ = [
    "Channel",
    "GuestMemory",
    "Interrupt",
    "MigrationClient",
    "RegionClient",
    "Reply",
    "VfioUserClient",
    "migrate",
]
