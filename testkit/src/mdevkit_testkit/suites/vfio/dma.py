"""DMA maps: what of a guest's memory a device may reach, and that a client cannot make it hold more than it should."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import pytest
from mdevkit_vfio.ops import DmaRegion, VfioOps

from mdevkit_testkit.leaks import Snapshot
from mdevkit_testkit.suites.base import refused
from mdevkit_testkit.suites.vfio.base import GuestMemory, VfioBase, map_or_close, needs

_PAGE: Final = 4096
#: Above the memory the suite maps when it opens a device.
_BASE: Final = 1 << 32
#: The most maps, and the most descriptors, a client may make a device hold.
_MAX_MAPS: Final = 1024
_MAX_DESCRIPTORS: Final = 256


class Dma(VfioBase):
    """DMA_MAP and DMA_UNMAP."""

    @pytest.fixture
    def guest(self) -> Iterator[GuestMemory]:
        """Return memory of a guest."""
        guest = GuestMemory(16 * _PAGE)
        yield guest
        guest.close()

    def test_memory_is_mapped_and_unmapped(self, ops: VfioOps, guest: GuestMemory) -> None:
        """Checks that a range, once unmapped, is unknown (ENOENT), can be mapped again, and its descriptor is closed."""
        before = Snapshot.take()
        for _ in range(3):
            map_or_close(ops, guest.region(_BASE))
            ops.dma_unmap(_BASE, guest.size)
            with refused("unmapping a range twice", errno.ENOENT):
                ops.dma_unmap(_BASE, guest.size)
        left = before.leaks()
        assert not left, f"left behind by memory that was unmapped: {', '.join(left)}"

    def test_unmap_takes_exactly_one_map(self, ops: VfioOps, guest: GuestMemory) -> None:
        """Checks that unmapping a part of a range, or more than it, is refused with ENOENT and leaves it mapped."""
        map_or_close(ops, guest.region(_BASE))
        for iova, size in ((_BASE, _PAGE), (_BASE + _PAGE, guest.size - _PAGE), (_BASE, guest.size + _PAGE), (0, 1 << 62)):
            with refused(f"unmapping {iova:#x}+{size:#x} of the map {_BASE:#x}+{guest.size:#x}", errno.ENOENT):
                ops.dma_unmap(iova, size)
        ops.dma_unmap(_BASE, guest.size)

    def test_overlapping_maps_are_refused(self, ops: VfioOps, guest: GuestMemory) -> None:
        """Checks that a map over an existing one gets EEXIST, and the descriptor stays the caller's."""
        map_or_close(ops, guest.region(_BASE))
        for iova in (_BASE, _BASE + _PAGE, _BASE - _PAGE):
            region = guest.region(iova)
            with refused(f"mapping {iova:#x}+{region.size:#x} over {_BASE:#x}+{guest.size:#x}", errno.EEXIST):
                ops.dma_map(region)
            _close_own(region)
        ops.dma_unmap(_BASE, guest.size)

    def test_impossible_maps_are_refused(self, ops: VfioOps, guest: GuestMemory) -> None:
        """Checks that an empty range and one that wraps around get EINVAL, and the descriptor stays the caller's."""
        for iova, size in ((_BASE, 0), ((1 << 64) - _PAGE, 2 * _PAGE)):
            region = DmaRegion(iova, size, readable=True, writable=True, fd=os.dup(guest.fd))
            with refused(f"mapping {iova:#x}+{size:#x}", errno.EINVAL):
                ops.dma_map(region)
            _close_own(region)

    def test_number_of_maps_is_bounded(self, ops: VfioOps) -> None:
        """Checks that a device takes no more than 1,024 maps, refuses more with ENOSPC, and takes new ones after unmap_all."""
        with refused(f"one of {_MAX_MAPS + 1} maps", errno.ENOSPC):
            for number in range(_MAX_MAPS + 1):
                ops.dma_map(DmaRegion(_BASE + number * _PAGE, _PAGE, readable=True, writable=True))
        ops.dma_unmap_all()
        ops.dma_map(DmaRegion(_BASE, _PAGE, readable=True, writable=True))
        ops.dma_unmap(_BASE, _PAGE)

    def test_number_of_descriptors_is_bounded(self, ops: VfioOps, guest: GuestMemory) -> None:
        """Checks that a device holds no more than 256 of a client's descriptors, and closes all of them at unmap_all."""
        ops.dma_unmap_all()
        before = Snapshot.take()
        with refused(f"one of {_MAX_DESCRIPTORS + 1} maps, each with a descriptor,", errno.EMFILE, errno.ENOSPC):
            for number in range(_MAX_DESCRIPTORS + 1):
                map_or_close(ops, guest.region(_BASE + number * _PAGE, _PAGE))
        ops.dma_unmap_all()
        left = before.leaks()
        assert not left, f"left behind by unmap_all: {', '.join(left)}"

    @needs("reset")
    def test_reset_keeps_maps(self, ops: VfioOps, guest: GuestMemory) -> None:
        """Checks that RESET leaves the memory mapped."""
        map_or_close(ops, guest.region(_BASE))
        ops.reset()
        ops.dma_unmap(_BASE, guest.size)


def _close_own(region: DmaRegion) -> None:
    """Close a descriptor that has to be the caller's still."""
    with suppress(OSError):
        os.close(region.fd)
        return
    raise AssertionError("a map was refused, and its descriptor is closed: it is the caller's then")
