"""The ifcvf parent driver's side of a device: virtio ops made of register accesses, as Linux's ifcvf does it.

It knows the function by its configuration space and BARs alone: it finds the areas through the capabilities, programs rings and
starts them when the driver is ready, and reads where a ring stands from the live-migration block. Guest memory and the dirty
log are no registers: on real hardware the IOMMU has them. Threads as `mdevkit_virtio.ops` says; `Hardware` is reached from any.
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from mdevkit.errors import MdevError
from mdevkit_virtio.layout import locate
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.ops import Callback, DeviceId, Status, VirtioOps
from mdevkit_virtio.status import DeviceStatus

from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.regs import Cfg

if TYPE_CHECKING:
    from mdevkit_virtio.memory import DirtyLog

#: What the driver passes on of what the hardware offers: MAC, MRG_RXBUF, ANY_LAYOUT, VERSION_1, IOMMU_PLATFORM, ORDER_PLATFORM.
FEATURES: Final = sum(1 << bit for bit in (5, 15, 27, 32, 33, 36))
VENDOR: Final = 0x8086
MAX_RING: Final = 32768
ALIGN: Final = 4096
_U16: Final = 0xFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF

#: Where the capability list starts (PCI 3.0, 6.7), and how many entries fit into it.
_CAPABILITIES: Final = 0x34
_MOST_CAPABILITIES: Final = 48
_BARS: Final = 6
#: Reads of a configuration that changes all the time, before it is taken as it is.
_MOST_READS: Final = 100


class Hardware(Protocol):
    """A PCI function, as a driver reaches it: any thread, without waiting for another one's access."""

    def config_read(self, offset: int, size: int) -> int:
        """Read configuration space."""
        ...

    def read(self, bar: int, offset: int, size: int) -> int:
        """Read a register."""
        ...

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register."""
        ...

    def bar_size(self, bar: int) -> int:
        """Return the length of a BAR in bytes; 0 for one that is not there."""
        ...

    def request_vector(self, vector: int, callback: Callback | None) -> None:
        """Have a callback called for a vector."""
        ...

    def map(self, table: MemoryTable) -> None:
        """Give the function this memory (IOMMU)."""
        ...

    def log(self, log: DirtyLog | None, rings: Collection[int]) -> bool:
        """Log what the function writes (IOMMU); false if that cannot be."""
        ...


@dataclass
class _Area:
    """One of the function's register areas."""

    bar: int
    offset: int
    length: int
    multiplier: int = 0


@dataclass
class _Queue:
    """What the driver has been told of a queue, until the function is."""

    num: int = MAX_RING
    address: tuple[int, int, int] = (0, 0, 0)
    state: int = 0
    ready: bool = False
    callback: Callback | None = None


def find_areas(hardware: Hardware) -> dict[Cfg, _Area]:
    """Return the areas the capabilities tell of: EIO when one is missing (ifcvf_init_hw)."""
    areas: dict[Cfg, _Area] = {}
    position = hardware.config_read(_CAPABILITIES, 1)
    for _ in range(_MOST_CAPABILITIES):
        if not position:
            break
        if hardware.config_read(position, 1) == regs.CAP_VENDOR:
            _note_area(hardware, position, areas)
        position = hardware.config_read(position + 1, 1)
    missing = [cfg.name.lower() for cfg in Cfg if cfg not in areas]
    if missing:
        raise MdevError(errno.EIO, f"incomplete PCI capabilities: {', '.join(missing)} not found", hardware)
    return areas


def _note_area(hardware: Hardware, position: int, areas: dict[Cfg, _Area]) -> None:
    """Take a capability in, unless its BAR or range cannot be."""
    kind, bar = hardware.config_read(position + 3, 1), hardware.config_read(position + 4, 1)
    offset, length = hardware.config_read(position + 8, 4), hardware.config_read(position + 12, 4)
    if kind not in list(Cfg) or bar >= _BARS or offset + length > hardware.bar_size(bar):
        return
    multiplier = hardware.config_read(position + regs.CAP_SIZE, 4) if kind == Cfg.NOTIFY else 0
    areas.setdefault(Cfg(kind), _Area(bar, offset, length, multiplier))


class IfcvfOps(VirtioOps):
    """One function as a virtio device. EIO from the constructor for a function that lacks an area."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware: Final = hardware
        self._areas: Final = find_areas(hardware)
        self._queues: list[_Queue] = [_Queue() for _ in range(regs.QUEUES)]
        #: What the driver accepts; None for a choice that was refused.
        self._accepted: int | None = 0
        self._status = DeviceStatus()
        self._table = MemoryTable()
        self._doorbells: Final = [self._doorbell(index) for index in range(regs.QUEUES)]

    def __str__(self) -> str:
        return "ifcvf"

    def close(self) -> None:
        """Stop the function and let go of the driver's memory; no op is called afterwards."""
        self._stop()
        self.set_map(MemoryTable())

    # -- registers -------------------------------------------------------------------------------------------------------

    def _get(self, name: str) -> int:
        offset, size = regs.OFFSETS[name]
        area = self._areas[Cfg.COMMON]
        return self._hardware.read(area.bar, area.offset + offset, size)

    def _set(self, name: str, value: int) -> None:
        offset, size = regs.OFFSETS[name]
        area = self._areas[Cfg.COMMON]
        self._hardware.write(area.bar, area.offset + offset, size, value)

    def _add_status(self, bits: int) -> int:
        """Add status bits and return what the function made of it."""
        self._set("device_status", self._get("device_status") | bits)
        return self._get("device_status")

    def _doorbell(self, index: int) -> tuple[int, int]:
        """Return BAR and offset of a queue's doorbell."""
        self._set("queue_select", index)
        area = self._areas[Cfg.NOTIFY]
        return area.bar, area.offset + self._get("queue_notify_off") * area.multiplier

    def _queue(self, index: int) -> _Queue:
        if not 0 <= index < regs.QUEUES:
            raise MdevError(errno.EINVAL, f"{self} has no queue {index}", self)
        return self._queues[index]

    def _idle(self, index: int) -> _Queue:
        queue = self._queue(index)
        if queue.ready:
            raise MdevError(errno.EBUSY, f"queue {index} of {self} is ready", self)
        return queue

    # -- virtqueues ------------------------------------------------------------------------------------------------------

    def get_vq_num_max(self, index: int) -> int:
        """See `VirtioOps.get_vq_num_max`."""
        return MAX_RING if 0 <= index < regs.QUEUES else 0

    def get_vq_align(self) -> int:
        """See `VirtioOps.get_vq_align`."""
        return ALIGN

    def set_vq_num(self, index: int, num: int) -> None:
        """See `VirtioOps.set_vq_num`."""
        if not 0 < num <= MAX_RING or num & num - 1:
            raise MdevError(errno.EINVAL, f"a ring of {num} buffers is no power of two up to {MAX_RING}", self)
        self._idle(index).num = num

    def set_vq_address(self, index: int, desc: int, driver: int, device: int) -> None:
        """See `VirtioOps.set_vq_address`."""
        queue = self._idle(index)
        if not all(0 <= address <= _U64 for address in (desc, driver, device)):
            raise MdevError(errno.EINVAL, f"{self}: queue {index} cannot be at addresses beyond 64 bits", self)
        queue.address = (desc, driver, device)

    def set_vq_state(self, index: int, state: int) -> None:
        """See `VirtioOps.set_vq_state`: written to the live-migration block when the queue starts."""
        queue = self._idle(index)
        if not 0 <= state <= _U16:
            raise MdevError(errno.EINVAL, f"{self}: queue {index} cannot go on at {state:#x}", self)
        queue.state = state

    def get_vq_state(self, index: int) -> int:
        """See `VirtioOps.get_vq_state`: the low half of the ring's word in the live-migration block."""
        queue = self._queue(index)
        if not (self._started and queue.ready):
            return queue.state
        return self._read_state(index)

    def _read_state(self, index: int) -> int:
        return self._hardware.read(regs.LM_BAR, regs.lm_offset(index), 4) & _U16

    def set_vq_cb(self, index: int, callback: Callback | None) -> None:
        """See `VirtioOps.set_vq_cb`: queue `index` has vector 1 + `index`."""
        queue = self._queue(index)
        queue.callback = callback
        self._hardware.request_vector(1 + index, callback)
        # Always, so that the function holds no descriptor that the driver has taken away.
        self._set("queue_select", index)
        self._set("queue_msix_vector", 1 + index)

    def set_vq_ready(self, index: int, ready: bool) -> None:
        """See `VirtioOps.set_vq_ready`: programmed at once while the function runs, else when it is started."""
        queue = self._queue(index)
        if queue.ready == ready:
            return
        if ready:
            locate(self._table, queue.num, *queue.address)
        if self._started and ready:
            self._start_queue(index)
        elif self._started:
            self._set("queue_select", index)
            self._set("queue_enable", 0)
            queue.state = self._read_state(index)
        queue.ready = ready

    def get_vq_ready(self, index: int) -> bool:
        """See `VirtioOps.get_vq_ready`."""
        return self._queue(index).ready

    def kick_vq(self, index: int) -> None:
        """See `VirtioOps.kick_vq`: the queue's number, written to its doorbell; the function ignores those of idle queues."""
        self._queue(index)
        bar, offset = self._doorbells[index]
        self._hardware.write(bar, offset, 2, index)

    # -- features and status ---------------------------------------------------------------------------------------------

    def get_device_id(self) -> int:
        """See `VirtioOps.get_device_id`."""
        return DeviceId.NET

    def get_vendor_id(self) -> int:
        """See `VirtioOps.get_vendor_id`."""
        return VENDOR

    def get_features(self) -> int:
        """See `VirtioOps.get_features`: what the hardware has, as far as this driver deals with it."""
        halves = []
        for half in (0, 1):
            self._set("device_feature_select", half)
            halves.append(self._get("device_feature"))
        return (halves[0] | halves[1] << 32) & FEATURES

    def set_features(self, features: int) -> None:
        """See `VirtioOps.set_features`."""
        if Status.FEATURES_OK in self._status:
            raise MdevError(errno.EBUSY, f"{self}: the features are settled", self)
        self._accepted = None
        if features & ~self.get_features():
            raise MdevError(errno.EINVAL, f"{self} does not offer features {features & ~self.get_features():#x}", self)
        self._accepted = features

    @property
    def _started(self) -> bool:
        return Status.DRIVER_OK in self._status

    def get_status(self) -> int:
        """See `VirtioOps.get_status`: what was set, and what the function says of its own health."""
        seen = self._get("device_status") & (Status.FAILED | Status.NEEDS_RESET)
        return int(self._status.value) | seen

    def set_status(self, status: int) -> None:
        """See `VirtioOps.set_status`: DRIVER_OK starts the function, 0 stops it. EIO when it will not start."""
        if status == 0:
            self._stop()
            return
        if self._get("device_status") & Status.NEEDS_RESET:
            self._status.breaks()
        added = self._status.check(status)
        if Status.FEATURES_OK in added and self._accepted is None:
            if Status.DRIVER_OK in added:
                raise MdevError(errno.EINVAL, f"{self}: the features are refused, and so is status {status:#x}", self)
            added &= ~Status.FEATURES_OK
        if Status.DRIVER_OK in added:
            self._start()
        if Status.FAILED in added:
            self._add_status(Status.FAILED)
        self._status.add(added)

    # -- starting and stopping (ifcvf_start_hw, ifcvf_stop_hw) -------------------------------------------------------------

    def _start(self) -> None:
        """Start the function, and every queue that is ready.

        Linux stops at the first queue that is not ready, and so never starts one behind it.
        """
        try:
            self._negotiate()
            self._set("msix_config", 0)
            for index, queue in enumerate(self._queues):
                if queue.ready:
                    self._start_queue(index)
            self._add_status(Status.DRIVER_OK)
        except MdevError:
            self._add_status(Status.FAILED)
            raise

    def _negotiate(self) -> None:
        features = self._accepted or 0
        self._set("device_status", 0)
        self._add_status(Status.ACKNOWLEDGE)
        self._add_status(Status.DRIVER)
        for half in (0, 1):
            self._set("driver_feature_select", half)
            self._set("driver_feature", features >> 32 * half & 0xFFFFFFFF)
        if not self._add_status(Status.FEATURES_OK) & Status.FEATURES_OK:
            raise MdevError(errno.EIO, f"{self}: the function refuses the features {features:#x}", self)

    def _start_queue(self, index: int) -> None:
        queue = self._queues[index]
        self._set("queue_select", index)
        for name, address in zip(("desc", "driver", "device"), queue.address, strict=True):
            self._set(f"queue_{name}_lo", address & 0xFFFFFFFF)
            self._set(f"queue_{name}_hi", address >> 32)
        self._set("queue_size", queue.num)
        self._hardware.write(regs.LM_BAR, regs.lm_offset(index), 4, queue.state | queue.state << 16)
        self._set("queue_msix_vector", 1 + index)
        if self._get("queue_msix_vector") == regs.NO_VECTOR:
            raise MdevError(errno.EINVAL, f"{self}: the function has no vector for queue {index}", self)
        self._set("queue_enable", 1)
        if not self._get("queue_enable"):
            raise MdevError(errno.EINVAL, f"{self}: the function refuses queue {index}: its size or addresses cannot be", self)

    def _stop(self) -> None:
        for vector in range(regs.VECTORS):
            self._hardware.request_vector(vector, None)
        self._set("msix_config", regs.NO_VECTOR)
        for index in range(regs.QUEUES):
            self._set("queue_select", index)
            self._set("queue_msix_vector", regs.NO_VECTOR)
        self._set("device_status", 0)
        self._queues = [_Queue() for _ in range(regs.QUEUES)]
        self._status.reset()
        self._accepted = 0

    # -- configuration space ---------------------------------------------------------------------------------------------

    def get_config(self, offset: int, length: int) -> bytes:
        """See `VirtioOps.get_config`: read until it did not change meanwhile."""
        area = self._check_range(offset, length)
        for _ in range(_MOST_READS):
            before = self._get("config_generation")
            data = bytes(self._hardware.read(area.bar, area.offset + offset + at, 1) for at in range(length))
            if self._get("config_generation") == before:
                break
        return data

    def set_config(self, offset: int, data: bytes) -> None:
        """See `VirtioOps.set_config`: all fields of a network device are a driver's to read only (virtio 1.2, 5.1.4): EACCES."""
        self._check_range(offset, len(data))
        raise MdevError(errno.EACCES, f"{self}: {len(data)} bytes at {offset} of the configuration are read-only", self)

    def _check_range(self, offset: int, length: int) -> _Area:
        area = self._areas[Cfg.DEVICE]
        if offset < 0 or length <= 0 or offset + length > area.length:
            raise MdevError(errno.EINVAL, f"{self} has {area.length} bytes of configuration, not {length} at {offset}", self)
        return area

    def set_config_cb(self, callback: Callback | None) -> None:
        """See `VirtioOps.set_config_cb`: vector 0."""
        self._hardware.request_vector(0, callback)
        self._set("msix_config", 0)

    def get_generation(self) -> int:
        """See `VirtioOps.get_generation`: the function's byte."""
        return self._get("config_generation")

    # -- the IOMMU's -----------------------------------------------------------------------------------------------------

    def set_map(self, table: MemoryTable) -> None:
        """See `VirtioOps.set_map`."""
        self._table = table
        self._hardware.map(table)

    def set_vq_kick(self, index: int, fd: int) -> bool:
        """See `VirtioOps.set_vq_kick`: kicks come by the doorbell."""
        del fd
        self._queue(index)
        return False

    def set_log(self, log: DirtyLog | None, rings: Collection[int] = ()) -> bool:
        """See `VirtioOps.set_log`."""
        return self._hardware.log(log, rings)
