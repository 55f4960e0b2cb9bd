"""The contract of the VFIO class, put together from its parts.

`mdevkit_vfio.ops` states it. What a device can do is found out from what it says of itself: a test for something it does not
have is skipped and says so. State `VfioSuite.expected` so that nothing is lost that way unnoticed.
"""

from __future__ import annotations

from mdevkit_testkit.suites.vfio.config import ConfigSpace
from mdevkit_testkit.suites.vfio.dma import Dma
from mdevkit_testkit.suites.vfio.info import Info
from mdevkit_testkit.suites.vfio.irqs import Interrupts
from mdevkit_testkit.suites.vfio.mapping import MappedRegions
from mdevkit_testkit.suites.vfio.migration import Migration
from mdevkit_testkit.suites.vfio.serving import Serving
from mdevkit_testkit.suites.vfio.state import DeviceState

__all__ = ["VfioSuite"]


class VfioSuite(Info, ConfigSpace, DeviceState, Interrupts, Dma, MappedRegions, Migration, Serving):
    """Checks devices of the VFIO class: by their ops, and served to a client by the driver ``vfio_mdev``."""

    title = "VFIO class"
