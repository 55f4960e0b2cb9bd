"""mdpy as its guest driver sees it: ids, and a vendor capability that says what to draw on (mdpy-defs.h)."""

from __future__ import annotations

import struct
from typing import Final

from mdevkit_vfio.pci import Capability

from mdevkit_mbochs.display import DRM_FORMAT_XRGB8888

#: Red Hat; the device id is one of those QEMU's own devices do not use.
VENDOR_ID: Final = 0x1B36
DEVICE_ID: Final = 0x000F

#: Where the capability is: id, next, length, a reserved byte; then format, width and height, 4 bytes each.
CAPABILITY: Final = 0x40
_CAPABILITY_DATA: Final = struct.Struct("<xIII")

#: The region a client shows the picture from: the framebuffer once more.
DISPLAY_REGION: Final = 16


def capability(width: int, height: int) -> Capability:
    """Return the capability of a display of that size."""
    return Capability.vendor(_CAPABILITY_DATA.pack(DRM_FORMAT_XRGB8888, width, height), offset=CAPABILITY)
