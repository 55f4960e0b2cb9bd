"""Flavour mdev: two sub-functions given to two VFIO clients, which send each other frames through the card's switch."""

from __future__ import annotations

import errno
import os
import threading
import time
import zlib
from contextlib import ExitStack
from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mdevkit import MdevError, Pool, Registry
from mdevkit_subfunction import regs
from mdevkit_subfunction.eswitch import Eswitch
from mdevkit_subfunction.model import State, SubfunctionDevice
from mdevkit_subfunction.parent import SubfunctionParent
from mdevkit_vfio.bus import VfioBus
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.driver import VfioMdevDriver
from mdevkit_vfio.ops import DmaRegion
from mdevkit_vfio.uapi import Irq, MigrationState

MEMORY = 0x10000
SECOND = 5.0


class Guest:
    """What a driver of the window does, over vfio-user."""

    def __init__(self, mdev):
        self.client = VfioUserClient.connect(mdev.endpoint.describe()["socket"])
        self.window = self.client.region(0)
        self.memory = self.client.dma_map(MEMORY, 0x10000)
        self.interrupt = self.client.arm(Irq.INTX)[0]

    def address(self):
        return self.window.read(regs.HW_ADDR, 6)

    def post(self, size=2048):
        self.window.write_int(regs.RX_ADDR_LO, 4, MEMORY + 0x8000)
        self.window.write_int(regs.RX_LENGTH, 4, size)
        self.window.write_int(regs.RX_DOORBELL, 4, 1)

    def send(self, frame):
        self.memory.data[: len(frame)] = frame
        self.ring(MEMORY, len(frame))

    def ring(self, address, length):
        self.window.write_int(regs.TX_ADDR_LO, 4, address)
        self.window.write_int(regs.TX_LENGTH, 4, length)
        self.window.write_int(regs.TX_DOORBELL, 4, 1)

    def happened(self):
        """Wait for an interrupt, acknowledge it and return what it was for."""
        assert self.interrupt.wait(SECOND)
        bits = self.window.read_int(regs.STATUS, 4)
        self.window.write_int(regs.STATUS, 4, bits)
        self.client.unmask(Irq.INTX)
        return bits

    def received(self):
        size = self.window.read_int(regs.RX_LENGTH, 4)
        return bytes(self.memory.data[0x8000 : 0x8000 + size])


@pytest.fixture
def registry(runtime_folder):
    with Registry([VfioBus(), VfioMdevDriver(), SubfunctionParent()]) as registry:
        yield registry


@pytest.fixture
def pair(registry, runtime_folder):
    mdevs = [
        registry.create("subfunction-mdev", endpoint_path=str(runtime_folder / name), params={"hw_addr": f"02:00:00:00:00:{name}"})
        for name in ("0a", "0b")
    ]
    guests = [Guest(mdev) for mdev in mdevs]
    yield guests
    for guest in guests:
        guest.client.close()


def test_the_window_tells_who_the_sub_function_is(registry, pair):
    first, second = pair
    assert first.window.read_int(regs.MAGIC, 4) == regs.MAGIC_VALUE
    assert [guest.window.read_int(regs.SFNUM, 4) for guest in pair] == [0, 1]
    assert (first.address().hex(), second.address().hex()) == ("02000000000a", "02000000000b")
    assert {mdev.get_attribute("hw_addr") for mdev in registry.mdevs} == {"02:00:00:00:00:0a", "02:00:00:00:00:0b"}


def test_a_frame_goes_through_the_switch(registry, pair):
    first, second = pair
    second.post()
    frame = second.address() + first.address() + b"\x08\x00" + bytes(range(200))
    first.send(frame)
    assert second.happened() == regs.RX_DONE
    assert second.received() == frame
    assert first.happened() == regs.TX_DONE
    ports = registry.parent("0000:06:00.0").ops.eswitch.ports()
    assert [(port.representor.rx_packets, port.representor.tx_packets) for port in ports] == [(1, 0), (0, 1)]


def test_without_a_buffer_a_frame_is_dropped_and_counted(registry, pair):
    first, second = pair
    first.send(second.address() + first.address() + bytes(60))
    assert first.happened() == regs.TX_DONE
    ports = registry.parent("0000:06:00.0").ops.eswitch.ports()
    assert [port.representor.tx_dropped for port in ports] == [0, 1]
    assert second.window.read_int(regs.STATUS, 4) == 0


@pytest.mark.parametrize(("length", "address"), [(0, MEMORY), (regs.MAX_FRAME + 1, MEMORY), (64, 0xDEAD0000)])
def test_a_bad_buffer_is_the_guests_fault(pair, length, address):
    first, _ = pair
    first.ring(address, length)
    assert first.happened() == regs.TX_DONE | regs.FAULT


# -- guests that mean no good, and migration -----------------------------------------------------------------------------

#: Registers, and places between and behind them, in widths they have and others.
PLACES = st.tuples(st.one_of(st.integers(0, 0x40), st.integers(0, regs.BAR_SIZE - 8)), st.sampled_from([1, 2, 4, 8]))
#: Addresses a guest might give: its memory and its ends, nowhere, the last bytes there are.
VALUES = st.sampled_from([0, 1, 64, MEMORY, MEMORY + 0xFFFF, regs.MAX_FRAME, 0xFFFF0000, (1 << 32) - 1, (1 << 64) - 1])


class Memory:
    """A guest's memory, and no way to ask it for more."""

    def __init__(self):
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 0x10000)

    def region(self):
        return DmaRegion(MEMORY, 0x10000, readable=True, writable=True, fd=os.dup(self.fd))

    def dma_read(self, iova, count):
        raise MdevError(errno.EFAULT, f"{count} bytes at {iova:#x} are nobody's")

    def dma_write(self, iova, data):
        raise MdevError(errno.EFAULT, f"{len(data)} bytes at {iova:#x} are nobody's")


@pytest.fixture
def card(no_leaks):
    """A card by itself: its eswitch, and sub-functions with their memory, opened."""
    with ExitStack() as stack:
        card = SimpleNamespace(eswitch=Eswitch("card", Pool("sub-functions", 4)))

        def plug(number):
            mdev = SimpleNamespace(uuid=UUID(int=number), driver="vfio_mdev")
            port = card.eswitch.activate("mdev", mdev, bytes([2, 0, 0, 0, 0, number]))
            device, memory = SubfunctionDevice(card.eswitch, port, f"sub-function {number}"), Memory()
            port.function = device
            stack.callback(os.close, memory.fd)
            device.open(memory)
            stack.callback(device.release)
            device.dma_map(memory.region())
            return device, memory

        card.plug = plug
        yield card


def word(device, offset, value=None):
    if value is None:
        return int.from_bytes(device.read(0, offset, 4), "little")
    device.write(0, offset, value.to_bytes(4, "little"))
    return value


def post(device):
    word(device, regs.RX_ADDR_LO, MEMORY + 0x8000)
    word(device, regs.RX_LENGTH, 2048)
    word(device, regs.RX_DOORBELL, 1)


def fill(device, memory, frame):
    """Put a frame where the device is told it is."""
    os.pwrite(memory.fd, frame, 0)
    word(device, regs.TX_ADDR_LO, MEMORY)
    word(device, regs.TX_LENGTH, len(frame))


def wait_for(device, bits):
    deadline = time.monotonic() + SECOND
    while word(device, regs.STATUS) & bits != bits:
        assert time.monotonic() < deadline
        time.sleep(0.001)  # the worker tells by an interrupt that nobody has armed


FRAME = bytes([2, 0, 0, 0, 0, 2]) + bytes([2, 0, 0, 0, 0, 1]) + b"\x08\x00" + bytes(range(100))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(writes=st.lists(st.tuples(PLACES, VALUES), max_size=40))
def test_whatever_a_guest_writes_a_reset_makes_a_sub_function_of_it(card, writes):
    (first, memory), (second, other) = [card.plug(number) for number in (1, 2)]
    try:
        post(second)
        for (offset, size), value in writes:
            offset -= offset % size
            first.write(0, offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
            assert len(first.read(0, offset, size)) == size
        for device in (first, second):
            device.reset()
        assert [word(first, offset) for offset in (regs.MAGIC, regs.TX_LENGTH, regs.STATUS)] == [regs.MAGIC_VALUE, 0, 0]
        # A job of before the reset may still find nothing to do.
        post(second)
        fill(first, memory, FRAME)
        word(first, regs.TX_DOORBELL, 1)
        wait_for(second, regs.RX_DONE)
        assert os.pread(other.fd, len(FRAME), 0x8000) == FRAME
    finally:
        for port in card.eswitch.ports():
            port.function.release()
            card.eswitch.deactivate(port)


def test_memory_that_is_unmapped_is_not_written(card):
    (first, memory), (second, other) = [card.plug(number) for number in (1, 2)]
    post(second)
    second.dma_unmap(MEMORY, 0x10000)
    fill(first, memory, FRAME)
    word(first, regs.TX_DOORBELL, 1)
    wait_for(second, regs.RX_DONE | regs.FAULT)
    assert os.pread(other.fd, 0x10000, 0) == bytes(0x10000)


def move(source, target):
    """Migrate the state of a device that has been stopped."""
    source.migration.set_state(MigrationState.STOP_COPY)
    target.migration.set_state(MigrationState.RESUMING)
    while part := source.migration.read(1 << 16):
        target.migration.write(part)
    target.migration.set_state(MigrationState.RUNNING)


def test_a_frame_that_was_to_be_sent_is_sent_by_the_one_that_goes_on(card):
    """The doorbell is rung while migration has stopped the device: the frame leaves the other one, once."""
    (source, memory), (receiver, other), (target, third) = [card.plug(number) for number in (1, 2, 3)]
    post(receiver)
    for held in (memory, third):
        os.pwrite(held.fd, FRAME, 0)
    fill(source, memory, FRAME)
    source.migration.set_state(MigrationState.STOP)
    word(source, regs.TX_DOORBELL, 1)
    assert word(source, regs.STATUS) == 0
    move(source, target)
    wait_for(receiver, regs.RX_DONE)
    assert os.pread(other.fd, len(FRAME), 0x8000) == FRAME
    assert word(target, regs.STATUS) == regs.TX_DONE
    counted = [port.representor.rx_packets for port in card.eswitch.ports()]
    assert counted == [0, 0, 1]


def written_by_message(device, dma_write):
    """Have a device opened anew write the guest's memory through `dma_write`."""
    device.release()
    slow = Memory()
    slow.dma_write = dma_write
    device.open(slow)
    os.close(slow.fd)
    device.dma_map(DmaRegion(MEMORY, 0x10000, readable=True, writable=True))


@pytest.mark.parametrize(("interrupt", "posted"), [("stop", 1), ("reset", 0)])
def test_a_frame_that_arrives_while_the_device_stops_has_not_arrived(card, interrupt, posted):
    """It is being written, by message, when migration stops the device, or the guest resets it: the buffer stays the guest's."""
    (first, memory), (second, _) = [card.plug(number) for number in (1, 2)]
    written = threading.Event()

    def dma_write(iova, data):
        assert (iova, data) == (MEMORY + 0x8000, FRAME)
        if interrupt == "stop":
            second.migration.set_state(MigrationState.STOP)
        else:
            second.reset()
        written.set()

    written_by_message(second, dma_write)
    post(second)
    fill(first, memory, FRAME)
    word(first, regs.TX_DOORBELL, 1)
    assert written.wait(SECOND)
    behind = threading.Event()
    second.defer(behind.set)
    assert behind.wait(SECOND)
    assert (second.state.status, second.state.rx_posted) == (0, posted)
    assert word(first, regs.STATUS) == regs.TX_DONE


def test_a_frame_that_comes_after_a_reset_is_not_lost_with_the_one_before(card):
    """The reset comes while a frame is being written, by message; the guest posts a buffer at once, and another frame is taken."""
    (first, memory), (second, _) = [card.plug(number) for number in (1, 2)]
    later = FRAME + b"later"
    written = []

    def dma_write(iova, data):
        written.append(data)
        if data == FRAME:
            second.reset()
            post(second)
            assert second.deliver(later)

    written_by_message(second, dma_write)
    post(second)
    fill(first, memory, FRAME)
    word(first, regs.TX_DOORBELL, 1)
    wait_for(second, regs.RX_DONE)
    assert written == [FRAME, later]
    assert word(second, regs.RX_LENGTH) == len(later)


def test_who_a_sub_function_is_does_not_migrate(card):
    (source, _), (target, _) = card.plug(1), card.plug(2)
    post(source)
    before = target.read(0, regs.SFNUM, 12)
    move(source, target)
    assert target.read(0, regs.SFNUM, 12) == before != source.read(0, regs.SFNUM, 12)
    assert word(target, regs.RX_LENGTH) == 2048


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: setattr(state, "magic", 7), "magic number 0x7, not 0x314d4453"),
        (lambda state: setattr(state, "status", 8), "it has bits that no sub-function has"),
        (lambda state: setattr(state, "rx_posted", 2), "it has bits that no sub-function has"),
        (None, "the check sum is wrong"),
    ],
)
def test_a_stream_no_sub_function_has_written_is_refused(card, change, text):
    device, _ = card.plug(1)
    post(device)
    state = State.from_buffer_copy(device.migration.save())
    if change:
        change(state)
    stream = bytes(state) + (zlib.crc32(bytes(state)) + (change is None)).to_bytes(4, "little")
    with pytest.raises(MdevError, match=text):
        device.migration.load(stream)
    assert word(device, regs.RX_LENGTH) == 2048
