"""Guests that mean no good, with a function whole: registers, rings and memory as no driver would set them.

Whatever they do, the function neither fails nor writes where it may not, functions beside it go on, and a reset makes a working one
of it.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mdevkit import MdevError
from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.driver import IfcvfOps
from mdevkit_ifcvf_sim.pci import HostAccess
from mdevkit_testkit.suites.base import tolerated
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, Guest, NetPort
from mdevkit_vfio.ops import DmaRegion
from mdevkit_virtio.ops import Callback, Status

PATIENCE = 20
SIZE = 1 << 21
FRAME = b"\x02\0\0\0\0\x01" * 2 + b"\x88\xb5" + bytes(range(100))


class Nobody:
    """A client that shares no memory by message."""

    def dma_read(self, iova, count):
        raise MdevError(errno.EFAULT, f"{count} bytes at {iova:#x} are nobody's")

    def dma_write(self, iova, data):
        raise MdevError(errno.EFAULT, f"{len(data)} bytes at {iova:#x} are nobody's")


class Registers(HostAccess):
    """How a guest's driver reaches a function: registers by the device's ops, memory by DMA maps."""

    def read(self, bar, offset, size):
        return int.from_bytes(self._function.read(bar, offset, size), "little")

    def write(self, bar, offset, size, value):
        self._function.write(bar, offset, value.to_bytes(size, "little"))

    def map(self, table):
        """The test maps memory itself."""


@pytest.fixture
def open_function(machine):
    """Returns a function with a client, opened."""
    with ExitStack() as stack:

        def make():
            function = machine.function()
            function.open(Nobody())
            stack.callback(function.release)
            return function

        yield make


@pytest.fixture
def function(open_function):
    return open_function()


@pytest.fixture
def drive(machine):
    """Gives a function a driver that keeps the rules, and runs it."""

    def make(function):
        guest = machine.guest(IfcvfOps(Registers(function)))
        function.dma_map(region_of(guest))
        guest.start(num=64)
        return guest

    return make


def region_of(guest, iova=0):
    return DmaRegion(iova, SIZE, readable=True, writable=True, fd=os.dup(guest.memory.fd))


def works(guest):
    """Check that frames come back."""
    port = NetPort(guest)
    port.post(8)
    port.send(FRAME, FRAME[::-1])
    return port.expect(2, PATIENCE) == [FRAME, FRAME[::-1]]


def common(function, name, value=None):
    offset, size = regs.OFFSETS[name]
    if value is None:
        return int.from_bytes(function.read(regs.BAR, regs.COMMON_OFFSET + offset, size), "little")
    function.write(regs.BAR, regs.COMMON_OFFSET + offset, value.to_bytes(size, "little"))
    return value


# -- registers ---------------------------------------------------------------------------------------------------------------

AREAS = st.sampled_from([regs.COMMON_OFFSET, regs.ISR_OFFSET, regs.DEVICE_OFFSET, regs.NOTIFY_OFFSET, regs.BAR_SIZE - 64])
#: A register that is there, or any place.
NAMED = st.sampled_from(sorted(regs.FIELDS)).map(lambda offset: (regs.BAR, regs.COMMON_OFFSET + offset, regs.FIELDS[offset][1]))
ANYWHERE = st.one_of(
    st.tuples(
        st.just(regs.BAR), st.builds(lambda area, more: area + more, AREAS, st.integers(0, 56)), st.sampled_from([1, 2, 4, 8])
    ),
    st.tuples(st.just(regs.LM_BAR), st.integers(0, 0x80), st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just(regs.MSIX_BAR), st.integers(0, 0x80), st.sampled_from([1, 2, 4, 8])),
)
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 11, 15, 64, 0x80, 4096, SIZE - 16, 0xFFFF, (1 << 32) - 1]), st.integers(0, (1 << 64) - 1)
)
WRITES = st.tuples(st.just("write"), st.one_of(NAMED, ANYWHERE), VALUES)
MAPS = st.tuples(st.sampled_from(["map", "unmap"]), st.sampled_from([0, SIZE, 1 << 40, (1 << 64) - SIZE]), st.just(0))
STEPS = st.lists(st.one_of(WRITES, WRITES, WRITES, MAPS, st.just(("reset", 0, 0))), max_size=40)


def take_step(function, guest, what, where, value):
    if what == "map":
        region = region_of(guest, where)
        try:
            function.dma_map(region)
        except OSError:
            os.close(region.fd)
            raise
    elif what == "unmap":
        function.dma_unmap(where, SIZE)
    elif what == "reset":
        function.reset()
    else:
        bar, offset, size = where
        offset -= offset % size
        function.write(bar, offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
        assert len(function.read(bar, offset, size)) == size


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(steps=STEPS)
def test_whatever_a_guest_does_a_reset_makes_a_function_of_it(machine, steps):
    with ExitStack() as stack:
        function = machine.function()
        function.open(Nobody())
        stack.callback(function.release)
        guest = Guest(IfcvfOps(Registers(function)), 1 << 32)
        stack.callback(guest.close)
        for step in steps:
            with tolerated(f"step {step}") as refusals:  # of a map that overlaps, or is not there
                take_step(function, guest, *step)
            assert {error.errno for error in refusals} <= {errno.EEXIST, errno.ENOENT, errno.EINVAL}
        function.dma_unmap_all()
        function.reset()
        assert (common(function, "device_status"), common(function, "queue_enable")) == (0, 0)
        function.dma_map(region_of(guest))
        guest.start(num=64)
        assert works(guest)


@pytest.mark.parametrize(
    ("size", "address"),
    [(0, 0), (3, 0), (65535, 0), (64, 8), (64, SIZE), (64, SIZE - 16), (64, 1 << 63), (64, (1 << 64) - 16)],
    ids=hex,
)
def test_a_queue_that_cannot_be_is_not_enabled(function, drive, size, address):
    guest = drive(function)
    guest.ops.set_status(0)
    for status in (1, 3):
        common(function, "device_status", status)
    common(function, "driver_feature_select", 1)
    common(function, "driver_feature", 1)
    common(function, "device_status", 11)
    common(function, "queue_size", size)
    for name in ("desc", "driver", "device"):
        common(function, f"queue_{name}_lo", address & 0xFFFFFFFF)
        common(function, f"queue_{name}_hi", address >> 32)
    common(function, "queue_enable", 1)
    assert common(function, "queue_enable") == 0
    common(function, "device_status", 15)
    assert common(function, "device_status") == 15
    guest.start(num=64)
    assert works(guest)


@pytest.mark.parametrize("vector", [regs.VECTORS, 0x1234, 0xFFFE])
def test_a_vector_that_is_not_there_reads_back_as_none(function, vector):
    """As virtio 1.2, 4.1.5.1.2 has it; the driver then knows."""
    for name in ("msix_config", "queue_msix_vector"):
        common(function, name, regs.VECTORS - 1)
        assert common(function, name) == regs.VECTORS - 1
        common(function, name, vector)
        assert common(function, name) == regs.NO_VECTOR


# -- memory ------------------------------------------------------------------------------------------------------------------


def test_memory_that_goes_away_breaks_the_rings_and_is_not_written(function, drive):
    """The unmap works; the rings need a reset, and the driver is told by the configuration's vector."""
    guest = drive(function)
    assert works(guest)
    function.dma_unmap(0, SIZE)
    assert common(function, "device_status") == DRIVER_OK | Status.NEEDS_RESET
    assert guest.signalled(guest.config_call, PATIENCE)
    NetPort(guest).post(8)
    guest.rings[1].add([guest.place(bytes(12) + FRAME)], [], None)
    before = bytes(guest.memory.map)
    for index in (0, 1):
        guest.kick(index, always=True)
    time.sleep(0.05)  # in which nothing may happen
    assert bytes(guest.memory.map) == before
    function.dma_map(region_of(guest))
    guest.start(num=64)
    assert works(guest)


def test_memory_beside_the_rings_comes_and_goes(function, drive):
    guest = drive(function)
    for iova in (1 << 30, 1 << 40):
        function.dma_map(region_of(guest, iova))
        assert works(guest)
    function.dma_unmap(1 << 30, SIZE)
    assert works(guest)
    assert common(function, "device_status") == DRIVER_OK


def test_memory_that_is_not_shared_holds_no_ring(function, machine, caplog):
    """QEMU without share=on: the guest's driver finds a function that refuses its queues, and the log says why."""
    function.dma_map(DmaRegion(0, SIZE, readable=True, writable=True))
    guest = machine.guest(IfcvfOps(Registers(function)))
    guest.negotiate()
    common(function, "device_status", 1)
    common(function, "queue_enable", 1)
    assert common(function, "queue_enable") == 0
    function.dma_map(DmaRegion(1 << 40, SIZE, readable=True, writable=True))
    assert caplog.text.count("the client does not share its memory, so no ring can be there") == 1


@pytest.mark.parametrize("length", [0, 0x1000], ids=["cut to nothing", "cut to a page"])
def test_memory_that_is_truncated_hurts_its_guest_only(open_function, drive, length):
    """SIGBUS would end the whole process."""
    function, other = open_function(), open_function()
    neighbour = drive(other)
    guest = Guest(IfcvfOps(Registers(function)), 1 << 32)
    victim = os.memfd_create("victim", os.MFD_CLOEXEC)
    try:
        os.ftruncate(victim, SIZE)
        function.dma_map(DmaRegion(0, SIZE, readable=True, writable=True, fd=os.dup(victim)))
        for status in (1, 3):
            common(function, "device_status", status)
        common(function, "driver_feature_select", 1)
        common(function, "driver_feature", 1)
        common(function, "device_status", 11)
        for index in (0, 1):
            common(function, "queue_select", index)
            common(function, "queue_size", 64)
            for number, name in enumerate(("desc", "driver", "device")):
                common(function, f"queue_{name}_lo", 0x8000 + 0x8000 * index + 0x2000 * number)
            common(function, "queue_enable", 1)
            assert common(function, "queue_enable") == 1
        os.ftruncate(victim, length)
        common(function, "device_status", 15)
        for index in (0, 1):
            function.write(regs.BAR, regs.NOTIFY_OFFSET + 4 * index, index.to_bytes(2, "little"))
        assert Guest.wait(lambda: common(function, "device_status") & Status.NEEDS_RESET, PATIENCE)
        assert works(neighbour)
    finally:
        function.dma_unmap_all()
        guest.close()
        os.close(victim)


def test_a_broken_ring_breaks_no_other_function(open_function, drive):
    first, second = (drive(open_function()) for _ in range(2))
    ring = first.rings[1]
    first.memory.map[ring.driver + 2 : ring.driver + 4] = (20000).to_bytes(2, "little")
    first.kick(1, always=True)
    assert first.wait(lambda: first.ops.get_status() & Status.NEEDS_RESET, PATIENCE)
    assert second.ops.get_status() == DRIVER_OK
    assert works(second)
    first.start(num=64)
    assert works(first)


def test_doorbells_without_end_do_no_harm(function, drive):
    guest = drive(function)
    for number in range(2000):
        function.write(regs.BAR, regs.NOTIFY_OFFSET + number % 0x400 * 4, (number * 7919 & 0xFFFF).to_bytes(2, "little"))
    assert works(guest)


def test_the_interrupt_status_is_cleared_by_reading(function, drive):
    """Without vectors events are told by the pin (virtio 1.2, 4.1.4.5)."""
    guest = drive(function)
    for index in (0, 1):
        common(function, "queue_select", index)
        common(function, "queue_msix_vector", regs.NO_VECTOR)
    guest.ops.set_config_cb(Callback())
    assert works(guest)

    def status():
        return int.from_bytes(function.read(regs.BAR, regs.ISR_OFFSET, 1), "little")

    assert Guest.wait(lambda: status() & regs.ISR_QUEUE, PATIENCE)
    assert status() == 0
