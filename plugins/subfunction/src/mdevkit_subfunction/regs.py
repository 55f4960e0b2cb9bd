"""Registers of a sub-function that is given to a guest whole (flavour ``mdev``): its private window of the card's BAR.

The card is a simulation of ours: there is no data sheet. It has the ids of a ConnectX virtual function's vendor with a device
id of its own kind, and what a driver needs to know which sub-function it has.
"""

from __future__ import annotations

from typing import Final

VENDOR_ID: Final = 0x15B3
DEVICE_ID: Final = 0x5F00
#: Network controller, Ethernet.
CLASS_CODE: Final = 0x020000

#: Size of the window: 4 KiB, the least a sub-function of mlx5 has (log_min_sf_size 0).
BAR_SIZE: Final = 4096

MAGIC: Final = 0x00
MAGIC_VALUE: Final = 0x31464453  # "SDF1"
SFNUM: Final = 0x04
#: The Ethernet address, first byte first, in six bytes.
HW_ADDR: Final = 0x08
#: Written by the driver: the low 32 bits of the guest address of a frame, the high ones, its length, and a doorbell that sends it.
TX_ADDR_LO: Final = 0x10
TX_ADDR_HI: Final = 0x14
TX_LENGTH: Final = 0x18
TX_DOORBELL: Final = 0x1C
#: The same for a buffer that takes the next frame; the doorbell posts it, and the length becomes the frame's.
RX_ADDR_LO: Final = 0x20
RX_ADDR_HI: Final = 0x24
RX_LENGTH: Final = 0x28
RX_DOORBELL: Final = 0x2C
#: What has happened; 1 acknowledges.
STATUS: Final = 0x30
TX_DONE: Final = 1
RX_DONE: Final = 2
FAULT: Final = 4

#: Longest frame: an Ethernet jumbo frame's.
MAX_FRAME: Final = 9216
