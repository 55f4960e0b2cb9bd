"""The guest memory table: what may be in it, how addresses are found, what is refused and in which words."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_virtio import access
from mdevkit_virtio.memory import MAX_REGIONS, DirtyLog, MemoryTable, Region

PAGE = 4096


@pytest.fixture
def fd():
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 64 * PAGE)
    yield fd
    os.close(fd)


def _entries(folder):
    return list(Path(folder).iterdir())


def _refusal(function, *arguments, **more):
    with pytest.raises(MdevError) as caught:
        function(*arguments, **more)
    return caught.value


def test_a_region_maps_its_part_of_the_file(fd):
    os.pwrite(fd, b"here", 2 * PAGE + 100)
    region = Region(fd, 0x1000, PAGE, offset=2 * PAGE + 100)
    assert access.read(region.host, 4) == b"here"


def test_the_descriptor_may_be_closed_and_the_mapping_goes_with_the_last_table():
    fd = os.memfd_create("short-lived")
    os.ftruncate(fd, PAGE)
    gc.collect()
    before = len(_entries("/proc/self/fd"))
    table = MemoryTable([Region(fd, 0, PAGE)])
    os.close(fd)
    assert "short-lived" in Path("/proc/self/maps").read_text()
    del table  # at once, without the garbage collector: a client that reconnects must not pile up its memory
    assert "short-lived" not in Path("/proc/self/maps").read_text()
    assert len(_entries("/proc/self/fd")) == before - 1


def test_a_range_over_adjoining_regions_comes_in_pieces(fd):
    table = MemoryTable([Region(fd, PAGE, PAGE), Region(fd, 0, PAGE, offset=8 * PAGE)])
    pieces = list(table.pieces(PAGE - 10, 30))
    assert [(p.guest, p.length) for p in pieces] == [(PAGE - 10, 10), (PAGE, 20)]
    assert [p.host for p in pieces] == [table.regions[0].host + PAGE - 10, table.regions[1].host]


def test_an_address_outside_is_efault(fd):
    table = MemoryTable([Region(fd, PAGE, PAGE)])
    error = _refusal(list, table.pieces(PAGE, PAGE + 1))
    assert (error.errno, str(error)) == (errno.EFAULT, "guest address 0x2000 is outside the memory the driver has shared")


def test_ring_areas_are_found_by_either_address_and_lie_in_one_region(fd):
    table = MemoryTable([Region(fd, 0, PAGE, user=0x7F0000), Region(fd, PAGE, PAGE, offset=PAGE, user=0x100000)])
    assert table.contiguous(16, 32).host == table.contiguous(0x7F0010, 32, user=True).host
    error = _refusal(table.contiguous, PAGE - 8, 16)
    assert (error.errno, str(error)) == (errno.EFAULT, "16 bytes at guest address 0xff8 are not in one shared region")
    error = _refusal(table.contiguous, 0x7F1000, 1, user=True)
    assert str(error) == "1 bytes at frontend address 0x7f1000 are not in one shared region"


@pytest.mark.parametrize(("guest", "user"), [(PAGE - 1, 1 << 30), (1 << 30, PAGE - 1), (0, 0)])
def test_overlapping_regions_are_refused(fd, guest, user):
    table = MemoryTable([Region(fd, 0, PAGE)])
    error = _refusal(table.plus, Region(fd, guest, PAGE, user=user))
    assert error.errno == errno.EEXIST
    assert "overlaps the guest memory region of 0x1000 bytes" in str(error)


def test_regions_come_and_go_in_new_tables(fd):
    first, second = Region(fd, 0, PAGE), Region(fd, PAGE, PAGE, user=0x5000)
    table = MemoryTable([first]).plus(second)
    assert table.minus(PAGE, PAGE, 0x5000).regions == (first,)
    assert table.regions == (first, second)
    error = _refusal(table.minus, PAGE, PAGE, 0x6000)
    assert (error.errno, str(error)) == (errno.ENOENT, "there is no guest memory region of 0x1000 bytes at 0x1000")


def test_more_regions_than_a_client_may_have(fd):
    regions = [Region(fd, i * PAGE, PAGE) for i in range(MAX_REGIONS + 1)]
    error = _refusal(MemoryTable, regions)
    assert (error.errno, str(error)) == (errno.ENOSPC, "the client shares 1025 regions, 1024 are the most")


@pytest.mark.parametrize(
    ("guest", "size", "offset", "user"),
    [
        (0, 0, 0, 0),
        (0, -1, 0, 0),
        ((1 << 64) - PAGE, PAGE, 0, 0),
        (0, PAGE, 0, (1 << 64) - 1),
        (0, PAGE, (1 << 63) - 1, 0),
        (-1, PAGE, 0, 0),
    ],
)
def test_impossible_regions(fd, guest, size, offset, user):
    error = _refusal(Region, fd, guest, size, offset=offset, user=user)
    assert error.errno == errno.EINVAL
    assert "is not possible" in str(error)


def test_a_file_that_is_too_short(fd):
    error = _refusal(Region, fd, 0, 2 * PAGE, offset=63 * PAGE)
    assert error.errno == errno.EINVAL
    assert "has 262144 bytes, the region ends at 266240" in str(error)


def test_files_that_may_not_be_memory(fd):
    with tempfile.TemporaryFile(dir="/var/tmp") as disk:
        disk.truncate(PAGE)
        error = _refusal(Region, disk.fileno(), 0, PAGE)
    assert error.errno == errno.ENOTSUP
    assert str(error).startswith("guest memory must be a memfd, tmpfs or hugetlbfs file, not /var/tmp/")
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    error = _refusal(Region, reader, 0, PAGE)
    os.close(reader)
    assert error.errno == errno.EACCES
    assert "is not open for reading and writing" in str(error)


def test_a_dirty_log_is_checked_like_memory(fd):
    assert DirtyLog(fd, 8, offset=24).size == 8
    assert _refusal(DirtyLog, fd, 0).errno == errno.EINVAL
    assert _refusal(DirtyLog, fd, 65 * PAGE).errno == errno.EINVAL


@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=8), probes=st.lists(st.integers(0, 40 * PAGE)))
def test_look_up_agrees_with_looking_at_every_region(spans, probes):
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 64 * PAGE)
    table = MemoryTable()
    for start, size in spans:
        taken = {page for r in table.regions for page in range(r.guest // PAGE, (r.guest + r.size) // PAGE)}
        if taken.isdisjoint(range(start, start + size)):
            table = table.plus(Region(fd, start * PAGE, size * PAGE, offset=start * PAGE))
        else:
            assert _refusal(table.plus, Region(fd, start * PAGE, size * PAGE)).errno == errno.EEXIST
    os.close(fd)
    for probe in probes:
        expected = [r for r in table.regions if r.guest <= probe < r.guest + r.size]
        assert table.find(probe) is (expected[0] if expected else None)


def test_mapped_memory_costs_no_descriptor(fd):
    gc.collect()
    before = len(_entries("/proc/self/fd"))
    table = MemoryTable(Region(fd, at * PAGE, PAGE, offset=at * PAGE) for at in range(64))
    log = DirtyLog(fd, PAGE)
    # A client with as many regions as it may have must not take the descriptors of everybody else's devices.
    assert len(_entries("/proc/self/fd")) == before
    assert len({region.host for region in table.regions} | {log.host}) == 65
