"""Base address registers: what a vendor declares, and the rules a set of them obeys (PCI 3.0, 6.2.5; vfio-user).

Checked once, when the device is constructed; nothing here runs while a guest does.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mdevkit_vfio.ops import SparseArea
from mdevkit_vfio.pci import regs


@dataclass(frozen=True)
class Bar:
    """One base address register.

    `size`: bytes, a power of two; I/O 4 to 256, memory at least 16 (at most 2 GiB for ``mem32``).
    `kind`: I/O ports, or memory decoded in 32 or 64 bits; a 64-bit register takes the following index too.
    `mapped`: backed by a sealed memfd the client maps, `areas` limits the mapped part (multiples of the page size);
    accesses to the rest, and only those, reach `bar_read` and `bar_write`.
    `widest`: the widest access, in bytes, that `bar_read` and `bar_write` are given; wider ones are split.
    `allow_unaligned`: an access of 1, 2, 4 or 8 bytes is not split merely because its offset is odd.
    """

    size: int
    kind: Literal["io", "mem32", "mem64"] = "mem32"
    prefetchable: bool = False
    mapped: bool = False
    areas: Sequence[SparseArea] = ()
    widest: Literal[1, 2, 4, 8] = 4
    allow_unaligned: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("io", "mem32", "mem64"):
            raise ValueError(f"kind {self.kind!r} of a BAR: io, mem32 or mem64 is possible")
        low, high = {"io": (4, 256), "mem32": (16, 1 << 31), "mem64": (16, 1 << 62)}[self.kind]
        if not low <= self.size <= high or self.size & (self.size - 1):
            raise ValueError(f"{self.size} bytes for a BAR of kind {self.kind}: a power of two from {low} to {high} is possible")
        if self.widest not in (1, 2, 4, 8) or (self.kind == "io" and self.widest == 8):
            raise ValueError(f"accesses of {self.widest} bytes are not possible for a BAR of kind {self.kind}")
        if self.kind == "io" and (self.mapped or self.prefetchable):
            raise ValueError("I/O ports can be neither mapped nor prefetchable")
        if self.areas and not self.mapped:
            raise ValueError("areas of a BAR that is not mapped")
        self._check_areas()

    def _check_areas(self) -> None:
        if self.mapped and self.size % mmap.PAGESIZE:
            raise ValueError(f"a mapped BAR of {self.size} bytes is smaller than a page")
        end = 0
        for area in self.areas:
            if area.offset % mmap.PAGESIZE or area.size % mmap.PAGESIZE or area.size <= 0:
                raise ValueError(f"{area} is not made of whole pages")
            if area.offset < end or area.offset + area.size > self.size:
                raise ValueError(f"{area} overlaps another, is out of order, or leaves the BAR")
            end = area.offset + area.size

    @property
    def slots(self) -> int:
        """How many registers it takes."""
        return 2 if self.kind == "mem64" else 1

    @property
    def type_bits(self) -> int:
        """The read-only low bits (6.2.5.1)."""
        if self.kind == "io":
            return regs.BAR_IO
        return (regs.BAR_MEM64 if self.kind == "mem64" else 0) | (regs.BAR_PREFETCH if self.prefetchable else 0)

    @property
    def mapped_areas(self) -> Sequence[SparseArea]:
        """The parts that are memory."""
        if not self.mapped:
            return ()
        return self.areas or (SparseArea(0, self.size),)


def check_layout(bars: Mapping[int, Bar], interrupt_pin: int) -> None:
    """Raise ValueError for BARs that collide, or that cannot work together with INTx.

    A client of vfio-user (QEMU 11) unmaps every mapped BAR when INTx fires and, having no time-out for it, never maps them
    again until messages are enabled: such a device would silently lose the speed it asked for.
    """
    taken = {index + 1 for index, bar in bars.items() if bar.slots == 2}
    for index in bars:
        if not 0 <= index <= 5:
            raise ValueError(f"BAR {index}: 0 to 5 are possible")
        if index in taken:
            raise ValueError(f"BAR {index} is the upper half of the 64-bit BAR {index - 1}")
    if 6 in taken:
        raise ValueError("BAR 5 cannot be 64 bits wide")
    if interrupt_pin and any(bar.mapped for bar in bars.values()):
        raise ValueError("a device with a mapped BAR must use MSI or MSI-X: interrupt_pin has to be 0")
