"""The device status field (virtio 1.2, sections 2.1 and 3.1): which changes a driver may make.

Pure bookkeeping, done once for every vendor. `VirtioModel` calls it, with its lock held; `value` and `breaks` are for any thread.
"""

from __future__ import annotations

import errno
from itertools import pairwise
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.ops import RESET, Status

#: The bits in the order a driver sets them (3.1.1); FAILED may follow any of them.
_STEPS: Final = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)
_DRIVERS: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK | Status.FAILED


class DeviceStatus:
    """What the driver has set, and whether the device is broken."""

    def __init__(self) -> None:
        self._set = RESET
        self._broken = False

    def __contains__(self, bit: Status) -> bool:
        return bit in self._set

    @property
    def value(self) -> Status:
        """What a driver reads; any thread."""
        return self._set | Status.NEEDS_RESET if self._broken else self._set

    def check(self, value: int) -> Status:
        """Return the bits that writing `value`, which is not 0, adds.

        EINVAL for bits that are none, for a bit set before that is missing, for a bit without those before it. NEEDS_RESET
        is the device's: a driver that adds bits to what it has read writes it back, and one that leaves it out clears nothing.
        """
        if not 0 <= value <= 0xFF or value & ~(_DRIVERS | Status.NEEDS_RESET):
            raise MdevError(errno.EINVAL, f"status {value:#x} has bits that are none, or not a driver's to set")
        if value & Status.NEEDS_RESET and not self._broken:
            raise MdevError(errno.EINVAL, f"status {value:#x} has NEEDS_RESET, which is the device's to set")
        wanted = Status(value) & _DRIVERS
        missing = self._set & ~wanted
        if missing:
            raise MdevError(errno.EINVAL, f"status {value:#x} lacks {_names(missing)}: only a reset clears bits")
        for before, bit in pairwise(_STEPS):
            if bit in wanted and before not in wanted:
                raise MdevError(errno.EINVAL, f"status {value:#x} has {_names(bit)} without {_names(before)}")
        return wanted & ~self._set

    def add(self, bits: Status) -> None:
        """Set bits that `check` has returned."""
        self._set |= bits

    def breaks(self) -> bool:
        """Set NEEDS_RESET (2.1.1); any thread. True if the driver has to be told: it is past DRIVER_OK and did not know."""
        before, self._broken = self._broken, True
        return not before and Status.DRIVER_OK in self._set

    def reset(self) -> None:
        """Clear every bit."""
        self._set = RESET
        self._broken = False


def _names(bits: Status) -> str:
    return ", ".join(bit.name or hex(bit) for bit in Status if bit in bits)
