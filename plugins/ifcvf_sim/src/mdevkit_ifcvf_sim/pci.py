"""A function of the card as a PCI device: what a VFIO client gets when it has the whole card, and what the parent driver drives.

Registers are the model's; this adds configuration space, MSI-X and the pin, and guest memory by DMA mappings. The rings signal
eventfds of ours, and one thread turns them into interrupts: the thread that moves frames never waits for the device's lock.
"""

from __future__ import annotations

import logging
import os
import select
import struct
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError
from mdevkit_vfio.ops import DmaRegion
from mdevkit_vfio.pci import Bar, Capability, Msix, PciDevice, PciIds
from mdevkit_vfio.uapi import Region as VfioRegion
from mdevkit_virtio.memory import MemoryTable, Region
from mdevkit_virtio.ops import Callback

from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.model import Function

if TYPE_CHECKING:
    from mdevkit_virtio.memory import DirtyLog
    from mdevkit_virtio.ops import VirtioOps

log: Final = logging.getLogger("mdevkit.ifcvf_sim")

IDS: Final = PciIds(
    vendor=regs.VENDOR_ID,
    device=regs.DEVICE_ID,
    subsystem_vendor=regs.SUBSYSTEM_VENDOR_ID,
    subsystem_device=regs.SUBSYSTEM_ID,
    class_code=regs.CLASS_CODE,
    revision=regs.REVISION,
)

#: Index of our eventfds behind the vectors': for events without a vector, by the pin.
_PIN_QUEUE: Final = regs.VECTORS
_PIN_CONFIG: Final = regs.VECTORS + 1


class PciFunction(PciDevice):
    """One function of the card on top of the virtio device `rings`. `close` gives its descriptors and its thread back."""

    #: See `mdevkit_vfio.ops.SharedMemory`: rings and frames are in the guest's memory.
    shared_memory = True

    def __init__(self, rings: VirtioOps, name: str) -> None:
        super().__init__(
            IDS,
            {regs.BAR: Bar(regs.BAR_SIZE), regs.MSIX_BAR: Bar(regs.MSIX_BAR_SIZE), regs.LM_BAR: Bar(regs.LM_BAR_SIZE)},
            interrupt_pin=1,
            msix=Msix(vectors=regs.VECTORS, bar=regs.MSIX_BAR),
            capabilities=[_capability(cfg) for cfg in regs.Cfg],
            name=name,
        )
        self.function: Final = Function(rings, take_isr=self._take_isr)
        self._memory = MemoryTable()
        #: Whether the log says already that the client does not share its memory.
        self._warned = False
        self._isr = 0
        self._signals: Final = Signals(self._signalled, f"{name} interrupts")
        for index, key in enumerate((*range(regs.VECTORS), regs.NO_QUEUE_VECTOR, regs.NO_CONFIG_VECTOR)):
            self.function.request_vector(key, self._signals.callback(index))

    def __str__(self) -> str:
        return self.name

    def close(self) -> None:
        """Reset the function and end its thread; nobody uses it afterwards."""
        self.function.reset()
        self._signals.close()

    # -- registers, under the lock -----------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`."""
        return self.function.read(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`."""
        self.function.write(bar, offset, size, value)

    def device_reset(self) -> None:
        """See `PciDevice.device_reset`."""
        self.function.reset()
        self._isr = 0

    def suspend(self) -> None:
        """See `mdevkit_vfio.ops.PowerManaged`: no ring moves; the registers answer."""
        with self.lock:
            self.function.hold(True)

    def resume(self) -> None:
        """See `mdevkit_vfio.ops.PowerManaged`."""
        with self.lock:
            self.function.hold(False)

    def device_checkpoint(self) -> bytes | None:
        """See `PciDevice.device_checkpoint`: rings in the guest's memory do not go on in another process."""
        return None

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def _signalled(self, index: int) -> None:
        """Turn an event of the rings into an interrupt; on the thread of `Signals`."""
        if index < regs.VECTORS:
            self.trigger_msi(index)
            return
        with self.lock:
            self._isr |= regs.ISR_QUEUE if index == _PIN_QUEUE else regs.ISR_CONFIG
            self.set_intx(True)

    def _take_isr(self) -> int:
        """Read the interrupt status, which clears it and drops the pin (virtio 1.2, 4.1.4.5)."""
        with self.lock:
            isr, self._isr = self._isr, 0
            self.set_intx(False)
            return isr

    # -- guest memory --------------------------------------------------------------------------------------------------

    def dma_map(self, region: DmaRegion) -> None:
        """See `PciDevice.dma_map`: what the client shares for reading and writing can hold rings and frames."""
        shared = None
        if region.fd >= 0 and region.readable and region.writable:
            shared = Region(region.fd, region.iova, region.size, offset=region.offset)
        elif region.fd < 0 and region.writable and not self._warned:
            self._warned = True
            log.warning(
                "%s: the client does not share its memory, so no ring can be there (QEMU: memory-backend-memfd,share=on)", self
            )
        super().dma_map(region)
        if shared is not None:
            self._map(self._memory.plus(shared))

    def dma_unmap(self, iova: int, size: int) -> None:
        """See `PciDevice.dma_unmap`."""
        super().dma_unmap(iova, size)
        self._map(MemoryTable(region for region in self._memory.regions if not iova <= region.guest < iova + size))

    def dma_unmap_all(self) -> None:
        """See `PciDevice.dma_unmap_all`."""
        super().dma_unmap_all()
        self._map(MemoryTable())

    def device_detached(self) -> None:
        """See `PciDevice.device_detached`: the client's memory goes with it."""
        self.function.reset()
        self._map(MemoryTable())
        self._warned = False

    def _map(self, table: MemoryTable) -> None:
        """Use this memory from now on. Rings that were in what is gone are broken, which their driver is told."""
        self._memory = table
        try:
            self.function.rings.set_map(table)
        except MdevError as error:
            log.info("%s: %s", self, error)


class HostAccess:
    """How the parent driver reaches a function: configuration space, BARs and vectors. Implements `driver.Hardware`.

    Accesses do not take the device's lock: the function has no VFIO client then, and a callback of the driver's may be looking at
    a register while the driver's thread waits for it to return.
    """

    def __init__(self, function: PciFunction) -> None:
        self._function: Final = function

    def __str__(self) -> str:
        return self._function.name

    def config_read(self, offset: int, size: int) -> int:
        """See `driver.Hardware.config_read`."""
        return int.from_bytes(self._function.read(VfioRegion.CONFIG, offset, size), "little")

    def read(self, bar: int, offset: int, size: int) -> int:
        """See `driver.Hardware.read`."""
        return self._function.function.read(bar, offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `driver.Hardware.write`."""
        self._function.function.write(bar, offset, size, value)

    def bar_size(self, bar: int) -> int:
        """See `driver.Hardware.bar_size`."""
        return self._function.region_info(bar).size

    def request_vector(self, vector: int, callback: Callback | None) -> None:
        """See `driver.Hardware.request_vector`."""
        self._function.function.request_vector(vector, callback)

    def map(self, table: MemoryTable) -> None:
        """See `driver.Hardware.map`."""
        self._function.function.rings.set_map(table)

    def log(self, log: DirtyLog | None, rings: Collection[int]) -> bool:
        """See `driver.Hardware.log`."""
        return self._function.function.rings.set_log(log, rings)


class Signals:
    """Eventfds for the rings to write, and the thread that tells of them."""

    def __init__(self, signalled: Callable[[int], None], name: str) -> None:
        self._signalled: Final = signalled
        with ExitStack() as stack:
            *self._fds, self._stop_fd = (_eventfd(stack) for _ in range(regs.VECTORS + 3))
            self._thread: Final = threading.Thread(target=self._main, name=name, daemon=True)
            self._thread.start()
            self._stack: Final = stack.pop_all()

    def callback(self, index: int) -> Callback:
        """Return what the rings get."""
        return Callback(trigger=self._fds[index])

    def close(self) -> None:
        """End the thread and close the eventfds; the rings have none of them any more."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._stack.close()

    def _main(self) -> None:
        poll = select.poll()
        for fd in (*self._fds, self._stop_fd):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop_fd:
                    return
                with suppress(BlockingIOError):
                    os.eventfd_read(fd)
                    self._signalled(self._fds.index(fd))


def _eventfd(stack: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def _capability(cfg: regs.Cfg) -> Capability:
    """Return struct virtio_pci_cap (virtio 1.2, 4.1.4): type, BAR, where and how long; the notify area's has its multiplier."""
    offset, length = regs.AREAS[cfg]
    data = struct.pack("<BBBBBII", cfg, regs.BAR, 0, 0, 0, offset, length)
    if cfg is regs.Cfg.NOTIFY:
        data += struct.pack("<I", regs.NOTIFY_MULTIPLIER)
    return Capability.vendor(data)
