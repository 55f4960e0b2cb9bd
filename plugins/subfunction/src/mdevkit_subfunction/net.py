"""The sub-function of flavour ``virtio``: a virtio network device on a port of the card's switch.

Frames the driver sends go to the switch on the device's own thread; the switch delivers on any.
"""

from __future__ import annotations

from typing import Final

from mdevkit_virtio.netmodel import NetModel

from mdevkit_subfunction import regs
from mdevkit_subfunction.eswitch import Eswitch, Port

#: Frames that wait for the driver's buffers.
BACKLOG: Final = 1024


class SubfunctionNet(NetModel):
    """The device of `port`."""

    vendor_id = regs.VENDOR_ID

    def __init__(self, eswitch: Eswitch, port: Port, name: str) -> None:
        super().__init__(port.hw_addr, name=name, backlog=BACKLOG)
        self._eswitch: Final = eswitch
        self._port: Final = port

    def transmit(self, frame: bytes) -> None:
        """See `NetModel.transmit`."""
        self._eswitch.forward(self._port, frame)
