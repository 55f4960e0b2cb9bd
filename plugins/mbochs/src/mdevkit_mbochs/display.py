"""What both cards share: a framebuffer in BAR 0 that clients map, no interrupts, and a picture for whoever looks.

Register accesses come on the thread of the client's connection, looks on that of the onlookers; `PciDevice.lock` keeps them apart,
and is never held while pixels are copied. The guest draws without telling anybody.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from mmap import mmap
from typing import ClassVar, Final

from mdevkit.errors import MdevError
from mdevkit.screen import XRGB8888, Frame
from mdevkit_vfio.ops import DeviceInfo, IrqInfo, IrqRequest
from mdevkit_vfio.pci import Bar, Capability, PciDevice, PciIds
from mdevkit_vfio.pci.access import widths
from mdevkit_vfio.pci.regs import BASE_ADDRESS_0, COMMAND, CONVENTIONAL_SIZE, Command
from mdevkit_vfio.uapi import PCI_NUM_IRQS, Device, IrqFlag

from mdevkit_mbochs.attributes import LINUX, NONE
from mdevkit_mbochs.onlookers import Onlookers

#: DRM_FORMAT_XRGB8888 as a number (include/uapi/drm/drm_fourcc.h).
DRM_FORMAT_XRGB8888: Final = int.from_bytes(XRGB8888.encode(), "little")

#: Red Hat's virtio subsystem ids, which both samples carry.
SUBSYSTEM_VENDOR: Final = 0x1AF4
SUBSYSTEM_DEVICE: Final = 0x1100
#: Display controller, neither VGA nor XGA (PCI code and id assignment specification).
CLASS_CODE: Final = 0x038000
REVISION: Final = 0x01

FRAMEBUFFER: Final = 0

#: Bytes of configuration space in the samples, and what their command register starts with.
SAMPLE_CONFIG_SIZE: Final = 0xFF
_COMMAND_AT_START: Final = Command.IO | Command.MEMORY
_COMMAND_BITS: Final = Command.MEMORY | Command.MASTER | Command.PARITY | Command.SERR


class DisplayDevice(PciDevice, ABC):
    """A card with `memory_size` bytes of video memory in BAR 0 and `registers`, if any, in the others."""

    #: Value of the attribute ``compat``.
    compat: ClassVar[str] = NONE
    #: GET_INFO: indexes of regions.
    num_regions: ClassVar[int]

    def __init__(
        self,
        ids: tuple[int, int],
        memory_size: int,
        *,
        registers: dict[int, Bar] | None = None,
        capabilities: Sequence[Capability] = (),
        name: str,
    ) -> None:
        #: By index.
        self.bars: Final = {FRAMEBUFFER: Bar(memory_size, prefetchable=True, mapped=True), **(registers or {})}
        super().__init__(
            PciIds(*ids, SUBSYSTEM_VENDOR, SUBSYSTEM_DEVICE, CLASS_CODE, REVISION),
            self.bars,
            capabilities=capabilities,
            config_size=SAMPLE_CONFIG_SIZE if self.compat == LINUX else CONVENTIONAL_SIZE,
            name=name,
        )
        self.memory_size: Final = memory_size
        # As in the samples, decoding is on from the start, which no guest minds.
        self.config.define(COMMAND, 2, _COMMAND_AT_START, writable=_COMMAND_BITS)
        #: Who looks, and may.
        self.onlookers: Onlookers = Onlookers(name, self)

    @abstractmethod
    def frame(self) -> Frame | None:
        """Return where the picture is in the video memory, None while the guest shows nothing; any thread."""

    def scanout(self) -> tuple[Frame, mmap] | None:
        """Return the picture's place and the memory it is in, which stays valid as long as it is kept; any thread.

        The memory is exchanged when a client leaves, so ask anew for each look.
        """
        with self.lock:
            frame = self.frame()
            return None if frame is None else (frame, self.bar_memory(FRAMEBUFFER))

    def export(self) -> tuple[Frame, int]:
        """Return the picture's place and a new descriptor of the memory that cannot write to it; ENODATA without a picture."""
        with self.lock:
            frame = self.frame()
            if frame is None:
                raise MdevError(errno.ENODATA, f"{self.name} shows nothing: the guest has set no mode", self)
            return frame, self.open_memory(os.O_RDONLY)

    def open_memory(self, flags: int) -> int:
        """Return a new descriptor of the video memory, opened with `flags`, with a file position of its own; any thread."""
        with self.lock:
            fd = self.files()["bar0"]
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)

    def close(self) -> None:
        """Send everybody away who looks, and let go of the video memory; the device is not used afterwards. Without the lock."""
        self.onlookers.close()
        with self.lock:
            # The kit's memory goes when a client does, and there may have been none since the card drew into it.
            self._spaces[FRAMEBUFFER].drop_memory()

    def info(self) -> DeviceInfo:
        """GET_INFO."""
        return DeviceInfo(super().info().flags, self.num_regions, PCI_NUM_IRQS)


class SampleQuirks(DisplayDevice):
    """Mixed into a card: what both Linux samples do differently, whatever the card. ``compat=linux``.

    The configuration space ends one byte early and knows its base address registers only; RESET is not offered, though it
    works; there is no interrupt at any index, and SET_IRQS is always refused.
    """

    compat = LINUX

    def info(self) -> DeviceInfo:
        """GET_INFO: RESET works, but is not offered."""
        return DeviceInfo(Device.PCI, self.num_regions, PCI_NUM_IRQS)

    def irq_info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO: nothing anywhere; EINVAL for an unknown index."""
        super().irq_info(index)
        return IrqInfo(IrqFlag(0), 0)

    def set_irqs(self, request: IrqRequest) -> None:
        """SET_IRQS: EINVAL."""
        for fd in request.fds:
            if fd >= 0:
                os.close(fd)
        raise MdevError(errno.EINVAL, f"{self.name} has no interrupts", self)

    def config_write_hook(self, offset: int, data: bytes) -> bool:
        """Know the base address registers at their first bytes; the rest cannot be written."""
        for start, width in widths(offset, len(data), 4):
            index, inside = divmod(start - BASE_ADDRESS_0, 4)
            bar = self.bars.get(index)
            if bar is not None and not inside:
                value = int.from_bytes(data[start - offset :][:width], "little")
                # All ones ask for the size; anything else is stored, shorter accesses with zeros in the other bytes.
                mask = -bar.size if value == 0xFFFFFFFF else -1
                self.config.put(start, 4, value & mask & 0xFFFFFFF0 | bar.type_bits)
        return True
