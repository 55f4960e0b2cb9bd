"""The contract between virtio drivers and vendors: the twenty ops of mdev_virtio_ops (V12 series), and what they hand around.

A vendor implements `VirtioOps` for each device, most of them by subclassing `mdevkit_virtio.model.VirtioModel`; the
drivers ``virtio_mdev`` and ``vhost_mdev`` call it. Calls come from one thread at a time (the driver's), except `kick_vq`,
`get_vq_ready`, `get_status` and `get_generation`, which any thread may make at any time. A device fails a call by raising
`MdevError`; it never waits for its user inside one.

Linux's devices reach guest memory through the IOMMU or by kernel addresses. Here a device is told the memory of its driver
(`VirtioOps.set_map`), as vdpa's devices with an IOMMU of their own are (vdpa_config_ops.set_map).
"""

from __future__ import annotations

import contextlib
import os
import select
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mdevkit_virtio.memory import DirtyLog, MemoryTable


class Status(IntFlag):
    """Bits of the device status field (virtio 1.2, section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 0x40
    FAILED = 0x80


#: The status of a device that has been reset.
RESET: Final = Status(0)


class DeviceId(IntEnum):
    """Kinds of virtio devices (virtio 1.2, section 5). 0 is no device."""

    NONE = 0
    NET = 1


def signal_eventfd(fd: int) -> None:
    """Add 1 to an eventfd of a client's, unless that would block: a client that fills its counter must not stop us.

    Linux has no RWF_NOWAIT for writes to eventfds (EOPNOTSUPP), so it is asked first. Between that and the write a client that
    shares the descriptor could still fill it; that holds up a thread which serves this client only.
    """
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        if ready.poll(0) == [(fd, select.POLLOUT)]:
            os.eventfd_write(fd, 1)


def drain_eventfd(fd: int) -> bool:
    """Empty an eventfd of a client's; whether it had been signalled. RWF_NOWAIT, since the client decides whether it blocks."""
    with contextlib.suppress(OSError):
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    return False


@dataclass(frozen=True)
class Callback:
    """What a device does to interrupt its driver (struct vdpa_callback): calling it does that.

    `trigger` is an eventfd to write to, -1 for none; it stays the driver's, and stays open until another callback, or None,
    has been set. `function` is called where there is no eventfd: on any thread, soon to return, never raising.
    """

    function: Callable[[], None] | None = None
    trigger: int = -1

    def __call__(self) -> None:
        """Interrupt the driver; never blocks."""
        if self.trigger >= 0:
            signal_eventfd(self.trigger)
        elif self.function is not None:
            self.function()


class VirtioOps(ABC):
    """What a driver does with a virtio device. `index` is a virtqueue's; EINVAL for one beyond the last everywhere.

    A queue is configured (`set_vq_num`, `set_vq_address`, `set_vq_state`, callbacks, kick), then made ready. It carries traffic
    while it is ready and the status has DRIVER_OK.
    """

    # -- virtqueues ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def get_vq_num_max(self, index: int) -> int:
        """Return the largest ring the queue can have; 0 where there is no such queue, which is how a driver counts them."""

    @abstractmethod
    def get_vq_align(self) -> int:
        """Return the alignment of a ring's areas in bytes, a power of two."""

    @abstractmethod
    def set_vq_num(self, index: int, num: int) -> None:
        """Set the ring's size: EINVAL for one the ring layout forbids or beyond `get_vq_num_max`, EBUSY while ready."""

    @abstractmethod
    def set_vq_address(self, index: int, desc: int, driver: int, device: int) -> None:
        """Set the guest addresses of descriptor, driver (available ring) and device (used ring) area; EBUSY while ready."""

    @abstractmethod
    def set_vq_state(self, index: int, state: int) -> None:
        """Set where the ring goes on, as `get_vq_state` told it: EBUSY while ready. Reset makes it the beginning."""

    @abstractmethod
    def get_vq_state(self, index: int) -> int:
        """Return where the ring stands: the next buffer to take, as `layout.VringBase.encode` writes it.

        Exact for a queue that is not ready: every buffer before it has been given back. A snapshot while it is ready.
        """

    @abstractmethod
    def set_vq_cb(self, index: int, callback: Callback | None) -> None:
        """Set what tells the driver of used buffers; None for nothing. Allowed at any time, also on a live queue."""

    @abstractmethod
    def set_vq_ready(self, index: int, ready: bool) -> None:
        """Start the queue, or stop it: then no buffer of it is in use when this returns.

        Starting fails with EINVAL or EFAULT for addresses, sizes or a state that cannot be, and the queue stays not ready.
        Setting what is set already does nothing.
        """

    @abstractmethod
    def get_vq_ready(self, index: int) -> bool:
        """Whether the queue is ready."""

    @abstractmethod
    def kick_vq(self, index: int) -> None:
        """Tell the device of new buffers. Ignored unless the queue is ready."""

    # -- features and status ---------------------------------------------------------------------------------------------

    @abstractmethod
    def get_device_id(self) -> int:
        """Return the kind of device (`DeviceId`)."""

    @abstractmethod
    def get_vendor_id(self) -> int:
        """Return the vendor's number, as in a virtio-mmio device."""

    @abstractmethod
    def get_features(self) -> int:
        """Return the feature bits the device offers; the same ones as long as it lives."""

    @abstractmethod
    def set_features(self, features: int) -> None:
        """Set what the driver accepts of them: EINVAL for a choice the device cannot work with, EBUSY after FEATURES_OK."""

    @abstractmethod
    def get_status(self) -> int:
        """Return the device status: what was set, without FEATURES_OK if the device refuses, with NEEDS_RESET if it is broken."""

    @abstractmethod
    def set_status(self, status: int) -> None:
        """Set the device status; 0 resets the device, and always works.

        EINVAL for a status that lacks a bit set before, for bits that are none, and for bits out of order.
        """

    # -- configuration space ---------------------------------------------------------------------------------------------

    @abstractmethod
    def get_config(self, offset: int, length: int) -> bytes:
        """Read the device-specific configuration: EINVAL for a range outside it."""

    @abstractmethod
    def set_config(self, offset: int, data: bytes) -> None:
        """Write it: EINVAL outside it, EACCES for fields a driver may not write."""

    @abstractmethod
    def set_config_cb(self, callback: Callback | None) -> None:
        """Set what tells the driver of a change of configuration or status; None for nothing."""

    def get_generation(self) -> int:
        """Return a number that changes whenever the configuration does (u32); the one op a device may leave out."""
        return 0

    # -- what Linux has below the ops: memory, doorbells, migration --------------------------------------------------------

    @abstractmethod
    def set_map(self, table: MemoryTable) -> None:
        """Replace the memory the device may use. Allowed at any time: live queues go on in the new table.

        When this returns, nothing of the old table is used any more. EFAULT if a live ring is not in the new one: then that
        queue is broken (NEEDS_RESET), the table is in use nevertheless.
        """

    @abstractmethod
    def set_vq_kick(self, index: int, fd: int) -> bool:
        """Let the device wait for the driver's kicks itself: `fd` is the eventfd, -1 for none; it stays the driver's.

        False when the device cannot; then the driver waits and calls `kick_vq`. Allowed at any time.
        """

    def set_log(self, log: DirtyLog | None, rings: Collection[int] = ()) -> bool:  # noqa: ARG002  # for devices that can
        """Log every page written from now on, and the used rings of the queues `rings` too; None ends it.

        Any time, also on live queues. False when the device cannot: then it is not offered for migration.
        """
        return log is None
