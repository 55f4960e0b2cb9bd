"""The inside of one BAR: the vendor's registers, memory the client maps, and the MSI-X table.

Only accesses that are not a plain register access come here; those `PciDevice` hands to the vendor at once. Used under the
device's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from mdevkit_vfio.memory import SealedMemory
from mdevkit_vfio.ops import Mapping, RegionInfo
from mdevkit_vfio.pci.access import Window, pieces, widths
from mdevkit_vfio.pci.bars import Bar
from mdevkit_vfio.uapi import RegionFlag

_READ_WRITE: Final = RegionFlag.READ | RegionFlag.WRITE


class MemoryWindow:
    """A mapped area of a BAR, reached by message."""

    def __init__(self, space: BarSpace, start: int, size: int) -> None:
        self.start: Final = start
        self.end: Final = start + size
        self._space = space

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset` of the BAR."""
        return self._space.memory.map[offset : offset + count]

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset` of the BAR."""
        self._space.memory.map[offset : offset + len(data)] = data


class BarSpace:
    """BAR `index` of a device. `read_register` and `write_register` are the vendor's hooks, `windows` the kit's parts of it."""

    def __init__(
        self,
        index: int,
        bar: Bar,
        windows: Sequence[Window],
        read_register: Callable[[int, int, int], int],
        write_register: Callable[[int, int, int, int], None],
    ) -> None:
        self.index: Final = index
        self.bar: Final = bar
        self._read_register = read_register
        self._write_register = write_register
        self._memory: SealedMemory | None = None
        areas: list[Window] = [MemoryWindow(self, area.offset, area.size) for area in bar.mapped_areas]
        self._windows = _ordered([*areas, *windows], index, bar.size)

    @property
    def memory(self) -> SealedMemory:
        """What backs a mapped BAR; made when first needed."""
        if self._memory is None:
            if not self.bar.mapped:
                raise ValueError(f"BAR {self.index} is not a mapped one")
            self._memory = SealedMemory(f"mdevkit-bar{self.index}", self.bar.size)
        return self._memory

    def adopt(self, fd: int) -> None:
        """Use this file, which becomes ours, as the memory. EINVAL for one of the wrong size; then it is closed."""
        memory = SealedMemory.over(fd, self.bar.size)
        self.drop_memory()
        self._memory = memory

    def drop_memory(self) -> None:
        """Let go of the memory; the next client gets a new file, since the last one may still have this one mapped."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def info(self) -> RegionInfo:
        """GET_REGION_INFO."""
        if not self.bar.mapped:
            return RegionInfo(_READ_WRITE, self.bar.size)
        return RegionInfo(_READ_WRITE | RegionFlag.MMAP, self.bar.size, Mapping(self.memory.fd, 0, self.bar.areas))

    def direct(self) -> dict[int, int]:
        """Access sizes the vendor may get at once: size to the offset bits that must be 0. Empty if any part is the kit's."""
        if self._windows:
            return {}
        sizes = [size for size in (1, 2, 4, 8) if size <= self.bar.widest]
        return {size: 0 if self.bar.allow_unaligned else size - 1 for size in sizes}

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset`, split as the vendor and the windows need it."""
        parts = [
            self._read_registers(start, length) if window is None else window.read(start, length)
            for window, start, length in pieces(self._windows, offset, count)
        ]
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`; split as `read`."""
        for window, start, length in pieces(self._windows, offset, len(data)):
            part = data[start - offset : start - offset + length]
            if window is None:
                self._write_registers(start, part)
            else:
                window.write(start, part)

    def _split(self, offset: int, count: int) -> Sequence[tuple[int, int]]:
        if self.bar.allow_unaligned and count in (1, 2, 4, 8) and count <= self.bar.widest:
            return ((offset, count),)
        return tuple(widths(offset, count, self.bar.widest))

    def _read_registers(self, offset: int, count: int) -> bytes:
        return b"".join(
            self._read_register(self.index, start, size).to_bytes(size, "little") for start, size in self._split(offset, count)
        )

    def _write_registers(self, offset: int, data: bytes) -> None:
        for start, size in self._split(offset, len(data)):
            value = int.from_bytes(data[start - offset : start - offset + size], "little")
            self._write_register(self.index, start, size, value)


def _ordered(windows: list[Window], index: int, size: int) -> list[Window]:
    windows.sort(key=lambda window: window.start)
    end = 0
    for window in windows:
        if window.start < end:
            raise ValueError(f"BAR {index}: the MSI-X table or pending bits lie in a mapped area")
        end = window.end
    if end > size:
        raise ValueError(f"BAR {index} of {size} bytes ends before its MSI-X table or pending bits")
    return windows
