"""The driver ``virtio_mdev`` (virtio_mdev.c of the V12 series): makes a mediated device a virtio device of this process.

It binds devices of class VIRTIO on the ``mdev_virtio`` bus and registers a `VirtioDevice` below each, where the driver for its
kind (``virtio_net``) finds it. Rings and buffers live in a memfd of ours which the device is given (`VirtioOps.set_map`); each
queue and the configuration interrupt us through an eventfd, all on one thread per device.

Hooks are called by core from any thread. The transport's own calls come from the virtio driver: see `VirtioTransport`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

from mdevkit.driver import Driver
from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.paths import runtime_dir

from mdevkit_virtio.bus import VirtioMdev, VirtioMdevBus
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.memory import MemoryTable, Region
from mdevkit_virtio.ops import RESET, Callback, DeviceId, Status, VirtioOps
from mdevkit_virtio.virtio.bus import VirtioBus
from mdevkit_virtio.virtio.device import VirtioDevice, VirtioTransport
from mdevkit_virtio.virtio.irq import EventFd, InterruptThread
from mdevkit_virtio.virtio.vring import DriverVirtqueue, QueueRequest, make_memory, make_queue

if TYPE_CHECKING:
    from mdevkit.device import Device
    from mdevkit.registry import Registry

    from mdevkit_virtio.driverside import GuestMemory

log = logging.getLogger("mdevkit.virtio")

ACCESS_PLATFORM: Final = 33
ORDER_PLATFORM: Final = 36
#: Of the rings' and the transport's features, those ours have (vring_transport_features).
_SUPPORTED: Final = (
    Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.VERSION_1 | Feature.RING_PACKED | 1 << ACCESS_PLATFORM | 1 << ORDER_PLATFORM
)
#: All feature bits that are the rings' and the transport's.
_TRANSPORT: Final = sum(1 << bit for bit in range(28, 42))


class VirtioMdevTransport(VirtioTransport):
    """Carries a virtio driver's calls to the ops of a mediated device, which `bus_name` is the UUID of."""

    def __init__(self, ops: VirtioOps, bus_name: str, irq: InterruptThread) -> None:
        self.ops: Final = ops
        self.bus_name = bus_name
        self._irq: Final = irq
        self._memory: GuestMemory | None = None
        self._queues: Final[list[DriverVirtqueue]] = []
        #: By queue index; -1 is the configuration's.
        self._eventfds: Final[dict[int, EventFd]] = {}
        #: What a configuration interrupt calls; set by whoever makes the device.
        self.on_config: Callable[[], None] = lambda: None

    # -- features, status, configuration -----------------------------------------------------------------------------------

    def get_features(self) -> int:
        """See `VirtioTransport.get_features`."""
        return self.ops.get_features()

    def finalize_features(self, features: int) -> int:
        """See `VirtioTransport.finalize_features`; the device's error if it cannot work with them."""
        features &= ~(_TRANSPORT & ~_SUPPORTED)
        self.ops.set_features(features)
        return features

    def get_status(self) -> Status:
        """See `VirtioTransport.get_status`."""
        return Status(self.ops.get_status())

    def set_status(self, status: Status) -> None:
        """See `VirtioTransport.set_status`."""
        self.ops.set_status(status)

    def reset(self) -> None:
        """See `VirtioTransport.reset`."""
        self.ops.set_status(RESET)

    def generation(self) -> int:
        """See `VirtioTransport.generation`."""
        return self.ops.get_generation()

    def get_config(self, offset: int, length: int) -> bytes:
        """See `VirtioTransport.get_config`."""
        return self.ops.get_config(offset, length)

    def set_config(self, offset: int, data: bytes) -> None:
        """See `VirtioTransport.set_config`."""
        self.ops.set_config(offset, data)

    # -- queues ------------------------------------------------------------------------------------------------------------

    def find_vqs(self, requests: Sequence[QueueRequest], features: int) -> list[DriverVirtqueue | None]:
        """See `VirtioTransport.find_vqs`."""
        named = [request for request in requests if request.name is not None]
        sizes = [self._size_of(index, request) for index, request in enumerate(named)]
        ring_features = Feature(features & sum(Feature))
        align = self.ops.get_vq_align()
        with ExitStack() as undo:
            undo.callback(self.del_vqs)
            self._memory, sizes = make_memory(list(zip(named, sizes, strict=True)), align, ring_features)
            self.ops.set_map(MemoryTable([Region(self._memory.fd, 0, self._memory.size)]))
            for index, (request, num) in enumerate(zip(named, sizes, strict=True)):
                notify = partial(self.ops.kick_vq, index)
                queue = make_queue(request, index, num, self._memory, align, ring_features, notify)
                self._queues.append(queue)
                self._setup_vq(queue, request)
            self.ops.set_config_cb(self._interrupt(-1, lambda: self.on_config()))
            undo.pop_all()
        made = iter(self._queues)
        return [next(made) if request.name is not None else None for request in requests]

    def _size_of(self, index: int, request: QueueRequest) -> int:
        """Return how long a queue may be: ENOENT where there is none, or if it is set up already."""
        num = self.ops.get_vq_num_max(index)
        if not num:
            raise MdevError(errno.ENOENT, f"{self.bus_name} has no queue {index} ({request.name})", self)
        if self.ops.get_vq_ready(index):
            raise MdevError(errno.ENOENT, f"{self.bus_name}: queue {index} ({request.name}) is set up already", self)
        return num

    def _setup_vq(self, queue: DriverVirtqueue, request: QueueRequest) -> None:
        """Tell the device of a queue, in V12's order."""
        ops, index, ring = self.ops, queue.index, queue.ring
        ops.set_vq_cb(index, self._interrupt(index, request.callback or (lambda: None)))
        ops.set_vq_num(index, queue.num)
        try:
            ops.set_vq_address(index, ring.desc, ring.driver, ring.device)
        except MdevError as error:
            raise MdevError(errno.EINVAL, f"{self.bus_name}: queue {index} ({request.name}): {error}", self) from error
        ops.set_vq_ready(index, True)

    def _interrupt(self, index: int, function: Callable[[], None]) -> Callback:
        eventfd = self._eventfds[index] = EventFd(self._irq, function)
        return Callback(trigger=eventfd.fd)

    def del_vqs(self) -> None:
        """See `VirtioTransport.del_vqs`. A device that fails here is logged: it cannot keep what is ours."""
        for queue in self._queues:
            self._attempt(partial(self._del_vq, queue.index))
        if -1 in self._eventfds:
            self._attempt(partial(self.ops.set_config_cb, None))
        if self._memory is not None:
            self._attempt(partial(self.ops.set_map, MemoryTable()))
            self._memory.close()
            self._memory = None
        for eventfd in self._eventfds.values():
            eventfd.close()
        self._queues.clear()
        self._eventfds.clear()

    def _del_vq(self, index: int) -> None:
        self.ops.set_vq_ready(index, False)
        if self.ops.get_vq_ready(index):
            log.warning("%s: queue %d is still ready", self.bus_name, index)
        self.ops.set_vq_cb(index, None)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("%s: the device fails while its queues are taken down", self.bus_name)


class VirtioMdevEndpoint:
    """What a device that is bound to ``virtio_mdev`` offers: whatever its virtio device's driver does."""

    def __init__(self, device: VirtioDevice) -> None:
        #: The virtio device below the mediated one.
        self.device: Final = device

    def describe(self) -> Mapping[str, str]:
        """Return the facts of the virtio device's endpoint; without a driver, ``error`` says why."""
        facts = {"kind": "virtio", "device": self.device.name, "client": ""}
        # Read once: another thread may unbind the driver.
        endpoint = self.device.endpoint
        if endpoint is not None:
            return facts | dict(endpoint.describe())
        if self.device.driver is None:
            facts["error"] = f"{self.device} has no driver: {self.device.error or 'it was unbound'}"
        return facts

    def attach(self, client: str) -> Sequence[str]:
        """Return what the virtio device's endpoint does; EOPNOTSUPP without one."""
        endpoint = self.device.endpoint
        if endpoint is None:
            raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use {self.device}, which has no driver", self.device)
        return endpoint.attach(client)


class VirtioMdevDriver(Driver):
    """The driver; one object serves any number of devices."""

    name = "virtio_mdev"
    bus = VirtioMdevBus.name
    id_table = ("c01",)

    @hookimpl
    def driver_probe(self, device: Device) -> VirtioMdevEndpoint:
        """Register a virtio device below this one: ENODEV for a device that says it is none (device id 0).

        A driver that fails to take the virtio device fails this too. As in Linux, no driver, or one that finds the device is not
        for it (ENODEV, ENXIO), is no failure.
        """
        mdev = VirtioMdev.from_device(device)
        ops, registry = mdev.get_ops(), _registry_of(mdev)
        device_id = ops.get_device_id()
        if device_id == DeviceId.NONE:
            raise MdevError(errno.ENODEV, f"{mdev} is no virtio device: its device id is 0", mdev)
        irq = InterruptThread(f"{mdev.name} irq")
        transport = VirtioMdevTransport(ops, mdev.name, irq)
        virtio = VirtioDevice(device_id, ops.get_vendor_id(), transport, mdev)
        virtio.irq, transport.on_config = irq, virtio.config_changed
        virtio.listen = mdev.listen
        virtio.endpoint_path = mdev.endpoint_path or str(runtime_dir() / f"{mdev.name}.sock")
        with ExitStack() as undo:
            undo.callback(irq.close)
            irq.start()
            bus = _virtio_bus(registry)
            bus.register(registry, virtio)
            undo.callback(bus.unregister, registry, virtio)
            if virtio.error is not None and virtio.error.errno not in {errno.ENODEV, errno.ENXIO}:
                raise virtio.error
            undo.pop_all()
        return VirtioMdevEndpoint(virtio)

    @hookimpl
    def driver_remove(self, device: Device) -> None:
        """Take the virtio device away."""
        virtio = _virtio_of(device)
        registry = _registry_of(device)
        with ExitStack() as steps:  # last first, and each whatever becomes of the others
            steps.callback(virtio.irq.close)
            steps.callback(virtio.transport.del_vqs)
            _virtio_bus(registry).unregister(registry, virtio)

    @hookimpl
    def driver_let_go(self, device: Device, timeout: float, force: bool) -> None:
        """See `DriverSpec.driver_let_go`: up to the virtio device's driver."""
        virtio = _virtio_of(device)
        if virtio.bound is not None and virtio.driver is not None:
            virtio.bound.let_go(virtio, timeout, force)


def _virtio_of(device: Device) -> VirtioDevice:
    if not isinstance(device.endpoint, VirtioMdevEndpoint):
        raise MdevError(errno.ENODEV, f"{device} is no virtio device", device)
    return device.endpoint.device


def _registry_of(device: Device) -> Registry:
    assert device.registry is not None, "core sets it before anybody sees the device"
    return device.registry


def _virtio_bus(registry: Registry) -> VirtioBus:
    bus = registry.bus(VirtioBus.name)
    if not isinstance(bus, VirtioBus):
        raise MdevError(errno.ENODEV, f"bus {VirtioBus.name} is not the one of mdevkit-virtio", bus)
    return bus
