"""The bus ``virtio`` (drivers/virtio/virtio.c): matches virtio devices with their drivers and negotiates between them.

Everything a virtio driver has in common with the others is here: the order of the status bits, the features both sides know, FAILED
where something fails, and the order of suspend and resume. A driver subclasses `VirtioDriver`. Hooks are called by core from
any thread.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, ClassVar, Final

from mdevkit.bus import Bus
from mdevkit.driver import Driver
from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl

from mdevkit_virtio.ops import RESET, Status
from mdevkit_virtio.virtio.device import BUS, VirtioDevice

if TYPE_CHECKING:
    from mdevkit.device import Device
    from mdevkit.driver import Endpoint
    from mdevkit.registry import Registry

log = logging.getLogger("mdevkit.virtio")

#: Feature bits that are the rings' and the transport's business, not the driver's (VIRTIO_TRANSPORT_F_START and _END).
TRANSPORT_FEATURES: Final = range(28, 42)
VERSION_1: Final = 32


class VirtioDriver(Driver):
    """Base of a virtio driver (struct virtio_driver). Entries of the id table are ``d%08Xv`` or, for one vendor, ``d%08Xv%08X``."""

    bus = BUS
    #: Feature bits the driver knows, as numbers; those of `TRANSPORT_FEATURES` need not be named.
    feature_table: ClassVar[Sequence[int]] = ()

    def validate(self, device: VirtioDevice) -> None:
        """Look at what the device offers; may clear bits of ``device.features``. Raising fails the probe."""

    def probe(self, device: VirtioDevice) -> Endpoint | None:
        """Take the device, whose features are final: set up queues. Unless it calls ``device.ready()``, that is done afterwards."""
        raise NotImplementedError

    def remove(self, device: VirtioDevice) -> None:
        """Reset the device and take the queues down."""
        raise NotImplementedError

    def config_changed(self, device: VirtioDevice) -> None:
        """React to a configuration interrupt; on the interrupt thread."""

    def let_go(self, device: VirtioDevice, timeout: float, force: bool) -> None:
        """See `DriverSpec.driver_let_go`."""

    def freeze(self, device: VirtioDevice) -> None:
        """Stop using the device, which is reset before `restore`; raising refuses the suspend."""

    def restore(self, device: VirtioDevice) -> None:
        """Set up queues again on a device that has been reset; features are the same as before."""

    @hookimpl
    def driver_probe(self, device: Device) -> Endpoint | None:
        """Probe, make the device ready, then let configuration interrupts through; FAILED on failure (virtio_dev_probe)."""
        virtio = VirtioDevice.from_device(device)
        try:
            endpoint = self.probe(virtio)
            _ensure_ready(virtio)
        except BaseException:
            _fail(virtio)
            raise
        virtio.enable_config(partial(self.config_changed, virtio))
        return endpoint

    @hookimpl
    def driver_remove(self, device: Device) -> None:
        """See virtio_dev_remove()."""
        virtio = VirtioDevice.from_device(device)
        virtio.disable_config()
        self.remove(virtio)
        if virtio.status != RESET:
            log.warning("%s: driver %s did not reset it", virtio, self.name)

    @hookimpl
    def driver_let_go(self, device: Device, timeout: float, force: bool) -> None:
        """See `let_go`."""
        self.let_go(VirtioDevice.from_device(device), timeout, force)

    @hookimpl
    def driver_suspend(self, device: Device) -> None:
        """See virtio_device_freeze()."""
        virtio = VirtioDevice.from_device(device)
        virtio.disable_config()
        virtio.failed = Status.FAILED in virtio.status
        try:
            self.freeze(virtio)
        except BaseException:
            virtio.enable_config(partial(self.config_changed, virtio))
            raise

    @hookimpl
    def driver_resume(self, device: Device) -> None:
        """Do the second half of virtio_device_restore(); the bus has done the first."""
        virtio = VirtioDevice.from_device(device)
        try:
            self.restore(virtio)
            _ensure_ready(virtio)
        except BaseException:
            _fail(virtio)
            raise
        virtio.enable_config(partial(self.config_changed, virtio))


class VirtioBus(Bus):
    """The bus. `register` and `unregister` are for transports."""

    name = BUS

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        #: Numbers for devices (virtio_index_ida): those given back, least first, and the least that was never given.
        self._free: Final[list[int]] = []
        self._next = 0

    def register(self, registry: Registry, device: VirtioDevice) -> None:
        """Name a device, reset and acknowledge it, and add it below its parent (register_virtio_device).

        A driver that fails leaves the reason in ``device.error``. What the device raises at its reset is passed on.
        """
        with self._lock:
            device.index = heappop(self._free) if self._free else self._next
            self._next = max(self._next, device.index + 1)
        device.name = f"virtio{device.index}"
        try:
            # A previous driver may have left it in any state.
            device.reset()
            device.add_status(Status.ACKNOWLEDGE)
            registry.add_device(device)
        except BaseException:
            self._forget(device)
            raise

    def unregister(self, registry: Registry, device: VirtioDevice) -> None:
        """Take a device away, by force (unregister_virtio_device)."""
        try:
            registry.del_device(device)
        finally:
            self._forget(device)

    def _forget(self, device: VirtioDevice) -> None:
        with self._lock:
            if device.index >= 0:
                heappush(self._free, device.index)
                device.index = -1

    @hookimpl
    def bus_match(self, device: Device, driver: Driver) -> bool:
        """Compare the device id, and the vendor id where the driver's table names one (virtio_id_match)."""
        return any(device.match.startswith(entry) for entry in driver.id_table)

    @hookimpl
    def bus_probe(self, device: Device, driver: Driver) -> None:
        """Negotiate features (the first half of virtio_dev_probe); ENODEV if the device refuses them, FAILED on any failure.

        Unlike Linux, which leaves FAILED set for the next driver, this resets a device on which another one has failed, as virtio
        1.2, section 3.1.1 has it.
        """
        virtio = VirtioDevice.from_device(device)
        if not isinstance(driver, VirtioDriver):
            raise MdevError(errno.EINVAL, f"driver {driver.name} is no virtio driver", driver)
        if Status.FAILED in virtio.status:
            virtio.reset()
            virtio.add_status(Status.ACKNOWLEDGE)
        virtio.add_status(Status.DRIVER)
        try:
            _negotiate(virtio, driver)
        except BaseException:
            _fail(virtio)
            raise
        virtio.bound = driver

    @hookimpl
    def bus_remove(self, device: Device) -> None:
        """Acknowledge the device anew for its next driver; one that has failed stays so, to be looked at."""
        virtio = VirtioDevice.from_device(device)
        virtio.bound = None
        if Status.FAILED not in virtio.status:
            virtio.add_status(Status.ACKNOWLEDGE)

    @hookimpl
    def bus_resume(self, device: Device) -> None:
        """Reset, and bring the device to where its driver restores it (the first half of virtio_device_restore)."""
        virtio = VirtioDevice.from_device(device)
        virtio.reset()
        virtio.add_status(Status.ACKNOWLEDGE)
        if virtio.failed:
            virtio.add_status(Status.FAILED)
        virtio.add_status(Status.DRIVER)
        try:
            virtio.features = virtio.transport.finalize_features(virtio.features)
            virtio.features_ok()
        except BaseException:
            _fail(virtio)
            raise


def _negotiate(device: VirtioDevice, driver: VirtioDriver) -> None:
    offered = device.transport.get_features()
    if not offered >> VERSION_1 & 1:
        raise MdevError(errno.ENODEV, f"{device} is a legacy device: it does not offer VIRTIO_F_VERSION_1", device)
    known = {*driver.feature_table, *TRANSPORT_FEATURES}
    device.features = device.transport.finalize_features(offered & sum(1 << bit for bit in known))
    before = device.features
    driver.validate(device)
    if device.features != before:
        device.features = device.transport.finalize_features(device.features)
    device.features_ok()


def _ensure_ready(device: VirtioDevice) -> None:
    if Status.DRIVER_OK not in device.status:
        device.ready()


def _fail(device: VirtioDevice) -> None:
    """Tell the device that we gave up on it; whatever it makes of that must not hide why."""
    try:
        device.add_status(Status.FAILED)
    except Exception:
        log.exception("%s: cannot be told that it has failed", device)
