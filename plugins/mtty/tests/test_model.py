"""The default card as a PCI function: what a guest finds when it scans the bus, and one pin for two ports."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from mdevkit_mtty.model import MttyDevice
from mdevkit_mtty.regs import Counters, PortState
from mdevkit_mtty.state import OWN, CardState
from mdevkit_mtty.uart import Uart
from mdevkit_vfio.uapi import Device, Irq, MigrationState

#: What differs from zero in configuration space, with two ports.
CONFIG = {
    0x00: "48435332",
    0x04: "0100",
    0x06: "0002",
    0x08: "10020007",
    0x10: "01000000",
    0x14: "01000000",
    0x2C: "48435332",
    0x3D: "01",
    0x40: "23",
    0x43: "8023",
    0x48: "23",
    0x4C: "23",
    0x60: b"PCI Serial/UART".hex(),
}


@pytest.mark.parametrize("ports", [1, 2])
def test_configuration_space_is_the_samples_and_256_bytes_long(connect: Callable[..., Any], ports: int):
    client = connect(MttyDevice(ports))
    expected = bytearray(256)
    for offset, text in CONFIG.items():
        data = bytes.fromhex(text)
        expected[offset : offset + len(data)] = data
    if ports == 1:
        expected[0x14:0x18] = bytes(4)
    assert client.device.region_info(7).size == 256
    assert client.config(0, 256) == expected


def test_base_addresses_tell_their_size_and_keep_an_address(card: Any):
    for offset in (0x10, 0x14):
        card.write_config(offset, b"\xff\xff\xff\xff")
        assert card.config(offset, 4) == bytes.fromhex("f9ffffff")
        card.write_config(offset, bytes.fromhex("0ec00000"))
        assert card.config(offset, 4) == bytes.fromhex("09c00000")
    for offset in range(0x18, 0x28, 4):
        card.write_config(offset, b"\xff\xff\xff\xff")
        assert card.config(offset, 4) == bytes(4)


def test_the_command_register_obeys_the_guest_and_reset(card: Any):
    card.write_config(0x04, b"\xff\xff")
    assert card.config(0x04, 2) == bytes.fromhex("4505")
    card.write_config(0x04, b"\0\0")
    assert card.config(0x04, 2) == b"\0\0"
    card.device.reset()
    assert card.config(0x04, 4) == bytes.fromhex("01000002")


@pytest.mark.parametrize("ports", [1, 2])
def test_what_it_tells_about_itself(ports: int):
    device = MttyDevice(ports)
    assert device.info().flags == Device.PCI | Device.RESET
    assert [device.region_info(index).size for index in range(9)] == [8, 8 * (ports - 1), 0, 0, 0, 0, 0, 256, 0]
    assert [device.irq_info(index).count for index in range(3)] == [1, 0, 0]


def test_each_base_address_has_its_own_port(card: Any):
    card.write(0, 7, 0x11)
    card.write(1, 7, 0x22)
    assert (card.read(0, 7), card.read(1, 7)) == (0x11, 0x22)
    card.write(0, 0, 0x41)
    assert (card.read(0, 5), card.read(1, 5)) == (0x61, 0x60)


def test_a_wide_access_is_one_of_each_byte(card: Any):
    card.write(0, 4, 0x0B, 1)
    card.write(0, 2, 0x1301, 2)
    assert card.read(0, 3, 2) == 0x0B13
    assert card.read(0, 0, 8).to_bytes(8, "little") == bytes([0, 0, 0xC1, 0x13, 0x0B, 0x60, 0xB0, 0])


def test_the_pin_is_high_while_either_port_wants_it(card: Any):
    card.arm(Irq.INTX)
    card.write(0, 1, 0x01)
    card.write(1, 1, 0x01)
    card.write(1, 0, 0x41)
    card.write(0, 0, 0x42)
    assert card.fired(Irq.INTX) == 1
    card.mask(False)
    assert card.fired(Irq.INTX) == 1, "still high when the guest says that it has dealt with it"
    card.read(0, 0)
    card.mask(False)
    assert card.fired(Irq.INTX) == 1
    card.read(1, 0)
    card.mask(False)
    assert card.fired(Irq.INTX) == 0
    assert not card.config(0x06, 1)[0] & 0x08


def test_the_interrupt_disable_bit_holds_the_pin_back(card: Any):
    card.arm(Irq.INTX)
    card.write_config(0x04, b"\x01\x04")
    card.write(0, 1, 0x02)
    assert card.fired(Irq.INTX) == 0
    assert card.config(0x06, 1)[0] & 0x08
    card.write_config(0x04, b"\x01\x00")
    assert card.fired(Irq.INTX) == 1


def test_reset_powers_the_ports_on_and_lowers_the_pin(card: Any):
    fresh = MttyDevice(2).state.save()
    for port in (0, 1):
        for register in (7, 4, 1, 0, 0):
            card.write(port, register, 0x1F)
    assert card.device.interrupts.intx.level
    card.device.reset()
    assert not card.device.interrupts.intx.level
    assert card.device.state.save() == fresh


def test_reset_of_a_stopped_device_leaves_the_pin_low(card: Any):
    """Reset ends a migration first, and the device goes on for a moment with the interrupt it had."""
    card.arm(Irq.INTX)
    card.device.migration.set_state(MigrationState.STOP)
    card.write(0, 1, 0x02)
    card.device.reset()
    assert not card.device.interrupts.intx.level
    assert card.device.migration.state is MigrationState.RUNNING


def test_the_next_client_sees_nothing_of_the_last(card: Any):
    fresh = MttyDevice(2).state.save()
    card.write(0, 0, 0x41)
    card.write(1, 7, 0x5A)
    card.restart()
    assert card.device.state.save() == fresh


def test_the_state_can_live_in_memory_of_somebody_elses(connect: Callable[..., Any]):
    """Another process finds the port in that memory as it was, statistics included."""
    memory = bytearray(MttyDevice(1).state.memory)
    client = connect(MttyDevice(1, memory=memory))
    client.write(0, 2, 0x01)
    for value in b"parked":
        client.write(0, 0, value)
    found: CardState[PortState] = CardState(OWN, 1, bytearray(memory))
    counters: Counters = found.counters[0]
    uart = Uart(found.ports[0], counters)
    assert bytes(uart.read(0) for _ in range(6)) == b"parked"
    assert (counters.tx, counters.rx) == (6, 6)


def test_two_ports_at_once_do_not_mix(card: Any):
    """Bytes of two drivers, interleaved access by access."""
    data = [random.Random(port).randbytes(2048) for port in (0, 1)]
    received = [bytearray(), bytearray()]
    for port in (0, 1):
        card.write(port, 2, 0x81)
    for position in range(0, 2048, 16):
        for port in (0, 1):
            for value in data[port][position : position + 16]:
                card.write(port, 0, value)
        for port in (1, 0):
            received[port] += card.receive(port)
    assert received == data
