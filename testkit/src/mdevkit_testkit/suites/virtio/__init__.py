"""The contract of the virtio class, put together from its parts.

`mdevkit_virtio.ops` states it. What a device can do is found out by asking it: a test for something it does not have is skipped and
says so. State `VirtioSuite.expected` so that nothing is lost that way unnoticed.
"""

from __future__ import annotations

from mdevkit_testkit.suites.virtio.config import Configuration
from mdevkit_testkit.suites.virtio.queues import Queues
from mdevkit_testkit.suites.virtio.status import DeviceState
from mdevkit_testkit.suites.virtio.traffic import Traffic

__all__ = ["VirtioSuite"]


class VirtioSuite(DeviceState, Configuration, Queues, Traffic):
    """Checks devices of the virtio class by their ops, as the drivers ``virtio_mdev`` and ``vhost_mdev`` call them."""

    title = "virtio class"
