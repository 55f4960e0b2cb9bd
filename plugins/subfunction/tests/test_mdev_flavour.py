"""Flavour mdev: two sub-functions given to two VFIO clients, which send each other frames through the card's switch."""

from __future__ import annotations

import pytest
from mdevkit import Registry
from mdevkit_subfunction import regs
from mdevkit_subfunction.parent import SubfunctionParent
from mdevkit_vfio.bus import VfioBus
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.driver import VfioMdevDriver
from mdevkit_vfio.uapi import Irq

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
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Registry([VfioBus(), VfioMdevDriver(), SubfunctionParent()]) as registry:
        yield registry


@pytest.fixture
def pair(registry, tmp_path):
    mdevs = [
        registry.create("subfunction-mdev", endpoint_path=str(tmp_path / name), params={"hw_addr": f"02:00:00:00:00:{name}"})
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
