"""A virtio device as its driver sees it (struct virtio_device), and what its transport does for it (struct virtio_config_ops).

A transport makes the device and registers it on the ``virtio`` bus (`mdevkit_virtio.virtio.bus`). Its driver negotiates and asks
for queues through it, on the thread that probes; callbacks come on the device's interrupt thread.
"""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from mdevkit.device import Device
from mdevkit.errors import MdevError
from mdevkit.sockets import Listen, listen_at

from mdevkit_virtio.ops import Status

if TYPE_CHECKING:
    from mdevkit.parent import Parent

    from mdevkit_virtio.virtio.bus import VirtioDriver
    from mdevkit_virtio.virtio.irq import InterruptThread
    from mdevkit_virtio.virtio.vring import DriverVirtqueue, QueueRequest

#: Name of the bus.
BUS: Final = "virtio"
#: How often a configuration that changes while it is read is read again.
_CONFIG_TRIES: Final = 100


class VirtioTransport(ABC):
    """Carries what a virtio driver does to a device. One thread at a time, but for what `VirtioOps` lets any thread do."""

    #: What the device is called on the bus it comes from (virtio_bus_name).
    bus_name: str

    @abstractmethod
    def get_features(self) -> int:
        """Return the feature bits the device offers."""

    @abstractmethod
    def finalize_features(self, features: int) -> int:
        """Give the device the features the driver wants, without those our rings cannot do; return what it was given."""

    @abstractmethod
    def get_status(self) -> Status:
        """Return the device status."""

    @abstractmethod
    def set_status(self, status: Status) -> None:
        """Set the device status; not 0, which is `reset`."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the device: no buffer of ours is in use when this returns."""

    @abstractmethod
    def generation(self) -> int:
        """Return a number that changes with the configuration."""

    @abstractmethod
    def get_config(self, offset: int, length: int) -> bytes:
        """Read the device's configuration, once: EINVAL outside it."""

    @abstractmethod
    def set_config(self, offset: int, data: bytes) -> None:
        """Write it: EINVAL outside it, EACCES for what a driver may not write."""

    @abstractmethod
    def find_vqs(self, requests: Sequence[QueueRequest], features: int) -> list[DriverVirtqueue | None]:
        """Set up queues, all or none, and the configuration interrupt.

        The device's indexes count named queues only; the others are None. ENOENT for a queue the device has not, or that is set
        up already, ENOMEM, EINVAL for addresses it refuses.
        """

    @abstractmethod
    def del_vqs(self) -> None:
        """Take the queues and their memory down. Harmless when there are none."""


class VirtioDevice(Device):
    """A device on the ``virtio`` bus. Its name, ``virtioN``, is given by the bus."""

    def __init__(self, device_id: int, vendor_id: int, transport: VirtioTransport, parent: Device | Parent | None = None) -> None:
        super().__init__("virtio?", BUS, parent)
        self.device_id: Final = device_id
        self.vendor_id: Final = vendor_id
        self.transport: Final = transport
        #: The N of its name; set by the bus.
        self.index = -1
        #: What driver and device have agreed on.
        self.features = 0
        #: The driver that has it, None while none does.
        self.bound: VirtioDriver | None = None
        #: Interrupts of this device; set by the transport before it registers the device.
        self.irq: InterruptThread
        #: As `Mdev.listen`.
        self.listen: Listen = listen_at
        #: Whether the status was FAILED when the device was suspended.
        self.failed = False
        self._config_lock: Final = threading.Lock()
        self._config_function: Callable[[], None] | None = None
        self._config_pending = False

    @classmethod
    def from_device(cls, device: Device) -> VirtioDevice:
        """Return `device` as what it is; ENODEV when it is not on this bus."""
        if not isinstance(device, cls):
            raise MdevError(errno.ENODEV, f"{device} is on bus {device.bus}, not on {BUS}", device)
        return device

    @property
    def match(self) -> str:
        """``d%08Xv%08X`` of device and vendor id (virtio_uevent)."""
        return f"d{self.device_id:08X}v{self.vendor_id:08X}"

    # -- status ----------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """The device status."""
        return self.transport.get_status()

    def add_status(self, status: Status) -> None:
        """Set more bits of the device status (virtio_add_status)."""
        self.transport.set_status(self.transport.get_status() | status)

    def reset(self) -> None:
        """Reset the device."""
        self.transport.reset()

    def ready(self) -> None:
        """Tell the device that the driver is there (virtio_device_ready)."""
        self.add_status(Status.DRIVER_OK)

    def features_ok(self) -> None:
        """Tell the device that the features are final; ENODEV if it refuses them (virtio_features_ok)."""
        self.add_status(Status.FEATURES_OK)
        status = self.status
        if Status.FEATURES_OK not in status:
            raise MdevError(errno.ENODEV, f"{self} refuses features {self.features:#x} (status {status:#x})", self)

    def has(self, feature: int) -> bool:
        """Whether a feature, given as its bit number, has been negotiated."""
        return bool(self.features >> feature & 1)

    # -- configuration ---------------------------------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """Read fields of the configuration that belong together (virtio_cread_bytes); EIO if they never stand still."""
        for _ in range(_CONFIG_TRIES):
            before = self.transport.generation()
            data = self.transport.get_config(offset, length)
            if self.transport.generation() == before:
                return data
        raise MdevError(errno.EIO, f"the configuration of {self} changes faster than it can be read", self)

    def read_number(self, offset: int, width: int) -> int:
        """Read a little-endian field of `width` bytes."""
        return int.from_bytes(self.read_config(offset, width), "little")

    def config_changed(self) -> None:
        """Note a configuration interrupt (virtio_config_changed); for transports, on the interrupt thread."""
        with self._config_lock:
            function = self._config_function
            self._config_pending = function is None
        if function is not None:
            function()

    def enable_config(self, function: Callable[[], None]) -> None:
        """Call `function` at configuration interrupts, and soon if one has come meanwhile (virtio_config_core_enable)."""
        with self._config_lock:
            self._config_function = function
            pending, self._config_pending = self._config_pending, False
        if pending:
            self.irq.post(self.config_changed)

    def disable_config(self) -> None:
        """Keep configuration interrupts until `enable_config`; the function does not run any more when this returns."""
        with self.irq.paused(), self._config_lock:
            self._config_function = None

    # -- queues ----------------------------------------------------------------------------------------------------------

    def find_vqs(self, requests: Sequence[QueueRequest]) -> list[DriverVirtqueue | None]:
        """See `VirtioTransport.find_vqs`."""
        return self.transport.find_vqs(requests, self.features)

    def del_vqs(self) -> None:
        """See `VirtioTransport.del_vqs`."""
        self.transport.del_vqs()
