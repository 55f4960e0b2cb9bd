"""One PCI function: the ops of the VFIO class, made of configuration space, BARs, interrupts, DMA and migration.

Threads. The driver calls the ops from the thread of the client's connection, one at a time; a vendor may call what is
marked so from any thread. `PciDevice.lock` guards the device's state. It is never held while an eventfd is written, a
descriptor is drained, a DMA message is waited for or a thread is joined: what the device posts under the lock is delivered
when the lock becomes free. Eventfds are written by the connection's thread and the worker's, never by a thread that might
serve another device too; one in blocking mode only by the worker, so that the connection always notices its end.
"""

from __future__ import annotations

import errno
import logging
import mmap
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from mdevkit.errors import MdevError

from mdevkit_vfio.dma import Dma
from mdevkit_vfio.irq import Interrupts, Trigger
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.ops import (
    DeviceInfo,
    DmaRegion,
    DmaTransport,
    GfxPlane,
    IrqInfo,
    IrqRequest,
    MigrationOps,
    RegionInfo,
)
from mdevkit_vfio.pci.access import Window
from mdevkit_vfio.pci.bars import Bar, check_layout
from mdevkit_vfio.pci.config import Capability, PciConfig, PciIds, header
from mdevkit_vfio.pci.lock import OutboxLock
from mdevkit_vfio.pci.msi import MsiControl, Msix, MsixControl, MsixPending, MsixTable, make_msi_capability
from mdevkit_vfio.pci.space import BarSpace
from mdevkit_vfio.pci.worker import Job, Worker
from mdevkit_vfio.uapi import PCI_NUM_IRQS, PCI_NUM_REGIONS, Device, Region, RegionFlag

#: How long `release` waits for a deferred job to end, in seconds.
WORKER_SECONDS: Final = 1.0

#: Lengths of the parts of a checkpoint: configuration space, interrupts, MSI-X table, migration; the vendor's part follows.
_PARTS: Final = struct.Struct("<IIII")
_FILE: Final = "bar"

#: Sizes that reach the vendor at once in a region that is no BAR: none.
_SPLIT: Final[Mapping[int, int]] = {}
logger = logging.getLogger("mdevkit.vfio")


class PciDevice:
    """A PCI function of type 0. Subclass it: state registers in `bar_read` and `bar_write`, behaviour in the hooks.

    - `ids`: who it is; `bars`: index 0 to 5 to `Bar`.
    - `interrupt_pin`: 1 for INTA to 4 for INTD; 0 for a device with messages only, which one with a mapped BAR must be.
    - `capabilities`: first in the capability list, in this order; MSI and MSI-X follow.
    - `msi_vectors`: 1, 2, 4 ... 32, or 0 for no MSI; with mask bits if `msi_masking`. Without `msi_capability` the guest
      does not see it and only SET_IRQS reaches it, as with Linux's mtty.
    - `msix`: vectors and place of the MSI-X table.
    - `config_size`: bytes of configuration space, 256, or 4096 for PCI Express.
    - `name`: for logs and thread names, e.g. the device's UUID.

    Raises ValueError for a description no PCI function can have.
    """

    #: What VFIO's migration calls; None for a device that cannot migrate.
    migration: MigrationOps | None

    def __init__(
        self,
        ids: PciIds,
        bars: Mapping[int, Bar],
        *,
        interrupt_pin: int = 0,
        capabilities: Sequence[Capability] = (),
        msi_vectors: int = 0,
        msi_masking: bool = False,
        msi_capability: bool = True,
        msix: Msix | None = None,
        config_size: int = 256,
        name: str = "pci",
    ) -> None:
        check_layout(bars, interrupt_pin)
        #: Guards the device's state; re-entrant, used with ``with``. Taken around every hook.
        self.lock: Final[OutboxLock[Trigger | Job]] = OutboxLock(self._deliver)
        #: Configuration space; under `lock`.
        self.config: Final[PciConfig] = header(ids, bars, size=config_size, interrupt_pin=interrupt_pin)
        #: The interrupts' state; under `lock`. A vendor uses `set_intx`, `trigger_msi` and `interrupt` instead.
        self.interrupts: Final = Interrupts(
            self.lock.post, pins=1 if interrupt_pin else 0, msi=msi_vectors, msix=msix.vectors if msix else 0
        )
        #: Guest memory.
        self.dma: Final = Dma()
        self.name: Final = name
        self.migration = None
        for capability in capabilities:
            self.config.add_capability(capability)
        self._msi = self._add_msi(msi_vectors, msi_masking, msi_capability) if msi_vectors else None
        self._msix = self._add_msix(msix, bars) if msix else None
        self._table = MsixTable(msix, self.interrupts.msix) if msix else None
        self._spaces: Final = {index: self._space(index, bar, msix) for index, bar in bars.items()}
        self._direct: Final = {index: space.direct() for index, space in self._spaces.items()}
        self._worker = Worker(f"{name} worker")
        self._client_thread = 0
        self._attached = False
        self._needs_reset = True

    def _add_msi(self, vectors: int, masking: bool, visible: bool) -> MsiControl | None:
        capability = make_msi_capability(vectors, masking)
        if not visible:
            return None
        offset = self.config.add_capability(capability)
        return MsiControl(self.config, offset, self.interrupts.msi, masking)

    def _add_msix(self, msix: Msix, bars: Mapping[int, Bar]) -> MsixControl:
        if msix.bar not in bars or bars[msix.bar].kind == "io":
            raise ValueError(f"the MSI-X table needs a memory BAR, and BAR {msix.bar} is none")
        offset = self.config.add_capability(msix.capability())
        return MsixControl(self.config, offset, self.interrupts.msix)

    def _space(self, index: int, bar: Bar, msix: Msix | None) -> BarSpace:
        windows: list[Window] = []
        if msix is not None and self._table is not None and index == msix.bar:
            windows = [self._table, MsixPending(msix, self.interrupts.msix)]
        return BarSpace(index, bar, windows, self.bar_read, self.bar_write)

    # -- what a vendor overrides: called with `lock` held, on the thread of the client's connection ------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Read a register: `size` is 1, 2, 4 or 8 bytes, up to the BAR's `widest`, and divides `offset` unless the BAR allows
        otherwise. Returns 0 to 2**(8*size) - 1. A register that does not exist reads as 0 by default.
        """
        del bar, offset, size
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register; arguments as `bar_read`. Ignored by default."""

    def device_reset(self) -> None:
        """Put registers back to their values after power-on: before the first client, at RESET, and after a client left."""

    def device_attached(self) -> None:
        """Take notice of a client; an OSError refuses it."""

    def device_detached(self) -> None:
        """Take notice that the client has gone; `device_reset` follows. DMA fails and deferred jobs have ended."""

    def config_write_hook(self, offset: int, data: bytes) -> bool:
        """Deal with a write to configuration space; True means that the usual write is to be left out."""
        del offset, data
        return False

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read a device-specific region, one that an overridden `region_info` offers; EINVAL by default."""
        del offset, count
        _no_region(region)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """Write a device-specific region, as `region_read`."""
        del offset, data
        _no_region(region)

    def device_checkpoint(self) -> bytes | None:
        """Return the vendor's part of the state, all that a guest could tell but configuration space, interrupts and the
        memory of mapped BARs; None if the device cannot go on in another process. Called whenever `lock` is about to be
        released, by an access or by the vendor, so it has to be quick. A device that counts time by itself puts in when it will
        be through (CLOCK_MONOTONIC, which goes on while no process does), not what is left. By default what migration saves.
        """
        return self.migration.save() if isinstance(self.migration, Migration) else None

    def device_restore(self, state: bytes) -> None:
        """Take over what `device_checkpoint` has returned in a process that is gone. By default `migration` loads it.

        Its `resume` follows, to begin again what was under way, or its `stop` if migration had stopped the device. Interrupts
        and DMA work already. Accesses happen once; what they did to the world outside, and deferred jobs, may have happened or not.
        """
        if isinstance(self.migration, Migration):
            self.migration.load(state)

    # -- what a vendor calls: any thread ----------------------------------------------------------------------------

    def set_intx(self, level: bool) -> None:
        """Drive the interrupt pin. It is level-triggered: keep it high until the guest has dealt with the cause.

        The kit signals the client, waits for its end-of-interrupt (UNMASK) and signals again if the level is still high.
        """
        with self.lock:
            self.interrupts.intx.set_level(level)
            self.config.set_interrupt_status(level)

    def trigger_msi(self, vector: int = 0) -> None:
        """Send the message of `vector` through MSI or MSI-X, whichever the client enabled.

        A masked vector stays pending; without either enabled the message is lost, as on hardware. ValueError for a vector the
        device does not have.
        """
        with self.lock:
            self.interrupts.fire(vector)

    def interrupt(self, level: bool, vector: int = 0) -> None:
        """Raise or drop the device's one cause of interrupts, by whichever means the client enabled.

        Through INTx it is the pin's level. With MSI or MSI-X a change to true sends `vector` once, and so does enabling the
        messages while it is true, so no cause is lost in the change. Do not mix with `set_intx`.
        """
        with self.lock:
            self.interrupts.set_cause(level, vector)
            self.config.set_interrupt_status(level)

    def defer(self, job: Callable[[], None]) -> None:
        """Run `job` on the device's worker thread after the current access, where DMA by message is allowed.

        The job runs without `lock`; jobs run in the order they came, and one that waits already is not added again, so a
        bound method is a better job than a new lambda each time. What it raises is logged. Without a client it is dropped,
        as are jobs not begun when the client leaves.
        """
        with self.lock:
            if self._attached:
                self.lock.post(job)

    def bar_memory(self, bar: int) -> mmap.mmap:
        """Return the memory of a mapped BAR. It cannot be resized by anyone, so it is safe to touch.

        Every client gets new memory of zeros, so ask again in `device_reset` or `device_attached` instead of keeping it.
        ValueError for a BAR that is not mapped.
        """
        if bar not in self._spaces:
            raise ValueError(f"the device has no BAR {bar}")
        with self.lock:
            return self._spaces[bar].memory.map

    def report_error(self) -> bool:
        """Tell the client through ERR that the device has failed beyond repair; False if it does not listen."""
        with self.lock:
            return self.interrupts.error()

    # -- VfioOps: called by the driver ------------------------------------------------------------------------------

    def open(self, dma: DmaTransport) -> None:
        """Take a client. EBUSY while another is; what `device_attached` raises refuses it."""
        with self.lock:
            if self._attached:
                raise MdevError(errno.EBUSY, f"{self.name} has a client already", self)
            # A job of the last client's must not reach this one's memory.
            if self._worker.running:
                raise MdevError(errno.EBUSY, f"{self.name} still runs a deferred job for the client that left", self)
            if self._needs_reset:
                self._reset()
            self._attached = True
            self._client_thread = threading.get_ident()
            self._worker = Worker(f"{self.name} worker")
        self.dma.attach(dma)
        try:
            with self.lock:
                self.device_attached()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let the client go: drop all it gave us, end the worker, reset. Waits at most for `WORKER_SECONDS` and a drain."""
        with self.lock:
            if not self._attached:
                return
            retired = self.interrupts.clear()
        self.dma.detach()
        for trigger in retired:
            trigger.close()
        if not self._worker.stop(WORKER_SECONDS):
            logger.error("%s: a deferred job still runs after its client has gone", self.name)
        with self.lock:
            self._settle()
            self._attached = False

    def _settle(self) -> None:
        """Back to the state before the client; a vendor's failure must not keep the driver from going on."""
        self._needs_reset = True
        try:
            try:
                self.device_detached()
            finally:
                for space in self._spaces.values():
                    space.drop_memory()
            self._reset()
        except Exception:
            logger.exception("%s: reset after its client has gone failed", self.name)

    def info(self) -> DeviceInfo:
        """GET_INFO."""
        return DeviceInfo(Device.RESET | Device.PCI, PCI_NUM_REGIONS, PCI_NUM_IRQS)

    def region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO; EINVAL beyond the PCI regions, which a vendor may override to offer its own."""
        space = self._spaces.get(index)
        if space is not None:
            with self.lock:
                return space.info()
        if index == Region.CONFIG:
            return RegionInfo(RegionFlag.READ | RegionFlag.WRITE, self.config.size)
        if not 0 <= index < PCI_NUM_REGIONS:
            _no_region(index)
        return RegionInfo(RegionFlag(0), 0)

    def irq_info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO; EINVAL for an unknown index."""
        return self.interrupts.info(index)

    def set_irqs(self, request: IrqRequest) -> None:
        """SET_IRQS; owns the request's descriptors. Errors as `Interrupts.set_irqs`."""
        self._client_thread = threading.get_ident()
        with self.lock:
            retired = self.interrupts.set_irqs(request)
        for trigger in retired:
            trigger.close()

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read `count` bytes of a region; the caller has checked the range."""
        unaligned = self._direct.get(region, _SPLIT).get(count)
        if unaligned is None or offset & unaligned:
            return self._read(region, offset, count)
        with self.lock:
            return self.bar_read(region, offset, count).to_bytes(count, "little")

    def _read(self, region: int, offset: int, count: int) -> bytes:
        with self.lock:
            if region == Region.CONFIG:
                if self._msi is not None:
                    self._msi.show_pending()
                return self.config.read(offset, count)
            space = self._spaces.get(region)
            return space.read(offset, count) if space else self.region_read(region, offset, count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write `data` to a region; the caller has checked the range."""
        count = len(data)
        unaligned = self._direct.get(region, _SPLIT).get(count)
        if unaligned is None or offset & unaligned:
            self._write(region, offset, data)
            return
        with self.lock:
            self.bar_write(region, offset, count, int.from_bytes(data, "little"))

    def _write(self, region: int, offset: int, data: bytes) -> None:
        with self.lock:
            space = self._spaces.get(region)
            if space is not None:
                space.write(offset, data)
            elif region != Region.CONFIG:
                self.region_write(region, offset, data)
            elif not self.config_write_hook(offset, data):
                self.config.write(offset, data)
                self._config_written()

    def _config_written(self) -> None:
        self.interrupts.intx.set_disabled(self.config.intx_disabled)
        if self._msi is not None:
            self._msi.written()
        if self._msix is not None:
            self._msix.written()

    def reset(self) -> None:
        """RESET; eventfds, DMA maps and the memory of mapped BARs stay."""
        with self.lock:
            self._reset()

    def _reset(self) -> None:
        self.config.reset()
        self.interrupts.reset()
        if self._table is not None:
            self._table.reset()
        if isinstance(self.migration, Migration):
            self.migration.reset()
        self.device_reset()
        self._needs_reset = False

    def dma_map(self, region: DmaRegion) -> None:
        """DMA_MAP; errors as `Dma.map`."""
        self.dma.map(region)

    def dma_unmap(self, iova: int, size: int) -> None:
        """DMA_UNMAP; errors as `Dma.unmap`."""
        self.dma.unmap(iova, size)

    def dma_unmap_all(self) -> None:
        """Every range goes away."""
        self.dma.unmap_all()

    def query_gfx_plane(self, plane_type: int) -> GfxPlane:
        """No display by default: ENOTTY."""
        del plane_type
        raise MdevError(errno.ENOTTY, f"{self.name} has no display", self)

    def gfx_dmabuf(self, dmabuf_id: int) -> int:
        """No display by default: ENOTTY."""
        del dmabuf_id
        raise MdevError(errno.ENOTTY, f"{self.name} has no display", self)

    def request(self, count: int) -> bool:
        """Ask the client to let go, through REQ; False if it is not armed."""
        del count
        with self.lock:
            return self.interrupts.request()

    # -- Parkable: called by the driver -----------------------------------------------------------------------------

    @property
    def parkable(self) -> bool:
        """See `Parkable.parkable`."""
        with self.lock:
            return self.device_checkpoint() is not None

    def park(self, store: Callable[[bytes], None] | None) -> None:
        """See `Parkable.park`. A checkpoint that fails is logged; what the guest does goes on."""
        with self.lock:
            self.lock.leaving = None if store is None else self._keeper(store)

    def _keeper(self, store: Callable[[bytes], None]) -> Callable[[], None]:
        def keep() -> None:
            try:
                store(self.checkpoint())
            except Exception:
                logger.exception("%s: its state cannot be kept; it will not survive its process", self.name)

        return keep

    def checkpoint(self) -> bytes:
        """See `Parkable.checkpoint`."""
        config, interrupts = self.config.save(), self.interrupts.save()
        table = b"" if self._table is None else self._table.save()
        migration = self.migration.checkpoint() if isinstance(self.migration, Migration) else b""
        head = _PARTS.pack(len(config), len(interrupts), len(table), len(migration))
        return b"".join((head, config, interrupts, table, migration, self.device_checkpoint() or b""))

    def restore(self, state: bytes) -> None:
        """See `Parkable.restore`."""
        parts = []
        at = _PARTS.size
        for size in _PARTS.unpack_from(state):
            parts.append(state[at : at + size])
            at += size
        config, interrupts, table, migration = parts
        with self.lock:
            self.config.load(config)
            if self._table is not None:
                self._table.load(table)
            self.interrupts.load(interrupts)
            self.device_restore(state[at:])
            if isinstance(self.migration, Migration):
                self.migration.restore(migration)

    def files(self) -> dict[str, int]:
        """See `Parkable.files`: the memory of mapped BARs."""
        with self.lock:
            return {f"{_FILE}{index}": space.memory.fd for index, space in self._spaces.items() if space.bar.mapped}

    def adopt(self, files: Mapping[str, int]) -> None:
        """See `Parkable.adopt`."""
        with self.lock:
            for name, fd in files.items():
                self._spaces[int(name.removeprefix(_FILE))].adopt(fd)
            self._needs_reset = False

    # -- delivery ---------------------------------------------------------------------------------------------------

    def _deliver(self, item: Trigger | Job) -> None:
        """Deliver what was posted under the lock; see the module for which thread writes an eventfd."""
        if not isinstance(item, Trigger):
            self._worker.submit(item)
        elif self._worker.current or (threading.get_ident() == self._client_thread and not item.blocking):
            item.signal()
        else:
            self._worker.submit(item.signal)


def _no_region(index: int) -> NoReturn:
    raise MdevError(errno.EINVAL, f"the device has no region {index}")
