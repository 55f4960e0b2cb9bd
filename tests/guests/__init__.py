"""Real guests for tests and the demo: stock Debian kernels in QEMU under TCG, driven through their serial console.

`find_kit` finds a QEMU, a kernel and a busybox; `Guest` boots them; `Device` serves a device with ``mdevkit run`` beside
it. All of it runs as an ordinary user, on the caller's thread, and leaves no process and no file behind.
"""

from tests.guests.device import Device, DeviceError
from tests.guests.guest import CommandFailedError, Guest, GuestError
from tests.guests.kit import Kit, MissingKitError, find_kit
from tests.guests.qmp import QmpError

__all__ = [
    "CommandFailedError",
    "Device",
    "DeviceError",
    "Guest",
    "GuestError",
    "Kit",
    "MissingKitError",
    "QmpError",
    "find_kit",
]
