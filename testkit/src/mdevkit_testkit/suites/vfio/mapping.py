"""Regions a client maps into its own memory: files it can write, and must not be able to hurt anybody with."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Final

from mdevkit_vfio.ops import Mapping, RegionInfo, SparseArea, VfioOps
from mdevkit_vfio.uapi import RegionFlag

from mdevkit_testkit.suites.base import refused
from mdevkit_testkit.suites.vfio.base import VfioBase, needs, region_name, regions

_SEALS: Final = {"F_SEAL_SHRINK": fcntl.F_SEAL_SHRINK, "F_SEAL_GROW": fcntl.F_SEAL_GROW, "F_SEAL_SEAL": fcntl.F_SEAL_SEAL}


class MappedRegions(VfioBase):
    """The files behind regions with the flag MMAP."""

    @needs("mapped")
    def test_mapped_regions_are_sealed_memory_files(self, ops: VfioOps) -> None:
        """Checks that what a client maps is a memfd that nobody can make shorter or longer, and covers the region."""
        for index, info, mapping in _mapped(ops):
            name = region_name(index)
            seals = fcntl.fcntl(mapping.fd, fcntl.F_GET_SEALS)
            missing = [seal for seal, bit in _SEALS.items() if not seals & bit]
            assert not missing, f"the file behind {name} lacks {', '.join(missing)}"
            size = os.fstat(mapping.fd).st_size
            assert size >= mapping.offset + info.size, f"the file behind {name} has {size} bytes, its region {info.size}"
            with refused(f"making the file behind {name} shorter", errno.EPERM):
                os.ftruncate(mapping.fd, 0)

    @needs("mapped")
    def test_mapped_areas_are_pages_of_the_region(self, ops: VfioOps) -> None:
        """Checks that the areas that can be mapped are whole pages, lie in the region and do not overlap."""
        for index, info, mapping in _mapped(ops):
            end = 0
            assert mapping.offset % mmap.PAGESIZE == 0, f"{region_name(index)} starts at {mapping.offset:#x} of its file"
            for area in sorted(_areas(info, mapping), key=lambda area: area.offset):
                name = f"area {area.offset:#x}+{area.size:#x} of {region_name(index)}"
                assert area.offset % mmap.PAGESIZE == 0, f"{name} does not start at a page"
                assert area.size % mmap.PAGESIZE == 0, f"{name} is not made of whole pages"
                assert area.size > 0, f"{name} is empty"
                assert area.offset >= end, f"{name} overlaps another"
                end = area.offset + area.size
                assert end <= info.size, f"{name} ends beyond the region's {info.size:#x} bytes"

    @needs("mapped")
    def test_mapping_and_messages_reach_the_same_bytes(self, ops: VfioOps) -> None:
        """Checks that what is written by message is seen in the mapping, and the other way round."""
        for index, info, mapping in _mapped(ops):
            for area in _areas(info, mapping):
                with mmap.mmap(mapping.fd, area.size, offset=mapping.offset + area.offset) as memory:
                    for place in (0, area.size - 8):
                        _check_same(ops, index, area.offset + place, memory, place)


def _mapped(ops: VfioOps) -> list[tuple[int, RegionInfo, Mapping]]:
    found = [(index, info, info.mapping) for index, info in regions(ops).items() if info.flags & RegionFlag.MMAP]
    return [(index, info, mapping) for index, info, mapping in found if mapping is not None]


def _areas(info: RegionInfo, mapping: Mapping) -> Sequence[SparseArea]:
    return mapping.areas or (SparseArea(0, info.size),)


def _check_same(ops: VfioOps, index: int, offset: int, memory: mmap.mmap, place: int) -> None:
    where = f"{region_name(index)} at {offset:#x}"
    by_message, by_mapping = b"\x12\x34\x56\x78\x9a\xbc\xde\xf0", b"\x0f\xed\xcb\xa9\x87\x65\x43\x21"
    ops.write(index, offset, by_message)
    found = memory[place : place + 8]
    assert found == by_message, f"{where}: {by_message.hex()} was written by message, the mapping has {found.hex()}"
    memory[place : place + 8] = by_mapping
    found = ops.read(index, offset, 8)
    assert found == by_mapping, f"{where}: {by_mapping.hex()} was written to the mapping, a message reads {found.hex()}"
