"""The device ops of the VFIO class: what a vendor's device owes the driver `vfio_mdev` and others that use it in this process.

The driver calls all of `VfioOps` but `query_gfx_plane` and `gfx_dmabuf`, for which vfio-user has no message, and where a device has
them the extras below: `SharedMemory`, `PowerManaged`, and `mdevkit_vfio.parking.Parkable`.

A vendor hands one object that satisfies `VfioOps` to ``VfioMdev.set_ops`` inside its create. Most vendors do not write
one: they subclass `mdevkit_vfio.pci.PciDevice`, which implements all of it for a PCI function.

Thread rules. `open` and `release` bracket one client. Between them the driver calls from the thread of that client's
connection, one call at a time; only `request` and `PowerManaged` come from other threads, while another op may run.
Interrupts may be raised, and DMA started, by the device from any thread. An op fails by raising `OSError` (or its subclass
`MdevError`); the client sees the errno.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mdevkit_vfio.uapi import Device, IrqFlag, IrqSet, MigrationFlag, MigrationState, RegionFlag


@dataclass(frozen=True)
class DeviceInfo:
    """Answer to GET_INFO: `flags`, and the number of region and irq indexes."""

    flags: Device
    num_regions: int
    num_irqs: int


@dataclass(frozen=True)
class SparseArea:
    """A part of a region that may be mapped; offset and size in bytes, multiples of the page size."""

    offset: int
    size: int


@dataclass(frozen=True)
class Mapping:
    """What backs a mappable region: a file descriptor that stays the device's, and the region's offset in it.

    The file must be a memfd sealed against resizing (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL). `areas` empty means the
    whole region may be mapped.
    """

    fd: int
    offset: int = 0
    areas: Sequence[SparseArea] = ()


@dataclass(frozen=True)
class RegionInfo:
    """Answer to GET_REGION_INFO. `size` 0: the region does not exist. `type`: (type, subtype) of a device-specific region."""

    flags: RegionFlag
    size: int
    mapping: Mapping | None = None
    type: tuple[int, int] | None = None


@dataclass(frozen=True)
class IrqInfo:
    """Answer to GET_IRQ_INFO: `count` interrupts at this index; 0 means none."""

    flags: IrqFlag
    count: int


@dataclass(frozen=True)
class IrqRequest:
    """One SET_IRQS, already checked against the wire rules (one data type, one action, start + count within the index).

    `bools` holds `count` values for DATA_BOOL. `fds` holds `count` descriptors for DATA_EVENTFD, each an eventfd checked
    on arrival, or -1 to de-assign; whoever receives the request owns them and closes them, also when it raises.
    """

    flags: IrqSet
    index: int
    start: int
    count: int
    bools: Sequence[bool] = ()
    fds: Sequence[int] = ()


@dataclass
class DmaRegion:
    """A range of the guest's memory the device may reach.

    `iova` and `size` in bytes. `fd` is -1 when the client shares no memory there; then only messages reach it. The
    region owns `fd`. `readable` and `writable` are from the device's point of view.
    """

    iova: int
    size: int
    readable: bool
    writable: bool
    fd: int = -1
    offset: int = 0


class DmaTransport(Protocol):
    """Reaches guest memory by message, for regions without a descriptor. Implemented by the connection.

    Neither method may be called inside a region access that the client waits for (the guest would deadlock until its
    time-out): EDEADLK. Use ``PciDevice.defer``.
    """

    def dma_read(self, iova: int, count: int) -> bytes:
        """Return `count` bytes of guest memory at `iova`; blocks; ENOTCONN once the client is gone, ETIMEDOUT after 5 s."""
        ...

    def dma_write(self, iova: int, data: bytes) -> None:
        """Write `data` to guest memory at `iova`; blocks; errors as `dma_read`."""
        ...


@dataclass(frozen=True)
class GfxPlane:
    """Answer to QUERY_GFX_PLANE (vfio_device_gfx_plane_info); all zero when nothing is shown."""

    drm_format: int = 0
    drm_format_mod: int = 0
    width: int = 0
    height: int = 0
    stride: int = 0
    size: int = 0
    x_pos: int = 0
    y_pos: int = 0
    x_hot: int = 0
    y_hot: int = 0
    region_index: int = 0
    dmabuf_id: int = 0


class MigrationOps(Protocol):
    """Migration v2 of one device. `mdevkit_vfio.migration.Migration` implements it from a save and a load function."""

    #: What the device can do; 0 is not allowed, a device without migration has ``migration = None``.
    flags: MigrationFlag

    @property
    def state(self) -> MigrationState:
        """The current state."""
        ...

    def set_state(self, wanted: MigrationState) -> None:
        """Walk to `wanted` by the kernel's table; EINVAL for an arc that is refused, the state reached so far stays."""
        ...

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes of the outgoing stream, b"" at its end; EINVAL or ENODEV outside a saving state."""
        ...

    def write(self, data: bytes) -> None:
        """Append to the incoming stream; EINVAL or ENODEV outside RESUMING, ENOMEM beyond the expected size."""
        ...

    def data_size(self) -> int:
        """Return an estimate of the STOP_COPY stream's length in bytes."""
        ...


class VfioOps(Protocol):
    """The ops of a VFIO device (mdev_vfio_ops of the V12 series, with its ioctls as methods)."""

    #: None for a device that cannot migrate.
    migration: MigrationOps | None

    def open(self, dma: DmaTransport) -> None:
        """Begin to serve a client. EBUSY or another error refuses it."""
        ...

    def release(self) -> None:
        """Drop the interrupts and DMA maps of the client, which is gone, and reset. Must not raise and must not block."""
        ...

    def info(self) -> DeviceInfo:
        """GET_INFO."""
        ...

    def region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO; EINVAL for an index the device does not have."""
        ...

    def irq_info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO; EINVAL for an index the device does not have."""
        ...

    def set_irqs(self, request: IrqRequest) -> None:
        """SET_IRQS."""
        ...

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read exactly `count` bytes; the driver has checked that offset and count lie within the region."""
        ...

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write `data`; range checked as for `read`. The device may keep `data`."""
        ...

    def reset(self) -> None:
        """RESET: back to the state after create; interrupts' eventfds and DMA maps stay."""
        ...

    def dma_map(self, region: DmaRegion) -> None:
        """Take a range of guest memory that became reachable. The device owns ``region.fd`` unless this raises."""
        ...

    def dma_unmap(self, iova: int, size: int) -> None:
        """Exactly the range of an earlier map goes away; ENOENT if there was none. No access to it after return."""
        ...

    def dma_unmap_all(self) -> None:
        """Every range goes away."""
        ...

    def query_gfx_plane(self, plane_type: int) -> GfxPlane:
        """QUERY_GFX_PLANE for a display; ENOTTY otherwise."""
        ...

    def gfx_dmabuf(self, dmabuf_id: int) -> int:
        """GET_GFX_DMABUF: a new descriptor owned by the caller; ENOENT for an unknown id, ENOTTY without a display."""
        ...

    def request(self, count: int) -> bool:
        """Ask the client to let go, for the `count`-th time (0 first), through the REQ irq; False if it is not armed."""
        ...


@runtime_checkable
class SharedMemory(Protocol):
    """What `VfioOps` may state besides, for a device that maps the guest's memory itself."""

    #: Whether the device is of no use to a client that does not share its memory by descriptor: users are told how to share it.
    shared_memory: bool


@runtime_checkable
class PowerManaged(Protocol):
    """What `VfioOps` may implement besides, for a device that does something by itself: without it only its client moves it.

    Called from any thread, in turn; accesses of the client come meanwhile, and are answered.
    """

    def suspend(self) -> None:
        """Stand still; raising refuses."""
        ...

    def resume(self) -> None:
        """Go on where it stood."""
        ...
