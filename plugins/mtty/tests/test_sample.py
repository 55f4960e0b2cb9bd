"""``compat=linux`` against an oracle of its own: a list of bytes and the rules of the sample, one after the other."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_mtty.model import SampleDevice
from mdevkit_vfio.uapi import Device, Irq, MigrationState, RegionFlag


class Oracle:
    """One port of the sample: the queue as a list, its place in the ring by counting."""

    def __init__(self) -> None:
        self.queue: list[int] = []
        self.ring = [0] * 16
        self.written = 0  # bytes stored since the FIFO was last cleared
        self.registers = [0] * 8
        self.divisor = 0
        self.dlab = self.overrun = False
        self.fcr = self.level = 0
        self.limit = 16
        self.interrupts = 0

    def looks_empty(self) -> bool:
        return len(self.queue) in (0, 16)

    def enabled(self, bit: int) -> bool:
        return bool(self.registers[1] & bit)

    def write(self, register: int, value: int) -> None:
        getattr(self, f"write_{register}", lambda value: None)(value)

    def write_0(self, value: int) -> None:
        if self.dlab:
            self.divisor |= value
        elif len(self.queue) < self.limit:
            self.ring[self.written % 16] = value
            self.written += 1
            self.queue.append(value)
            self.overrun = False
            self.interrupts += self.enabled(1) and len(self.queue) == self.level
        else:
            self.overrun = True
            self.interrupts += self.enabled(4)

    def write_1(self, value: int) -> None:
        if self.dlab:
            self.divisor |= value * 256
        else:
            self.registers[1] = value
            self.interrupts += bool(value & 2) and self.looks_empty()

    def write_2(self, value: int) -> None:
        self.fcr = value
        if value & 6:
            self.queue.clear()
            self.written = 0
        self.level = 1
        self.limit = 16 if value & 1 else 1

    def write_3(self, value: int) -> None:
        self.registers[3] = value
        self.dlab = value >= 128
        if self.dlab:
            self.divisor = 0

    def write_4(self, value: int) -> None:
        self.registers[4] = value
        self.interrupts += self.enabled(8) and bool(value & 8)
        self.interrupts += self.enabled(8) and bool(value & 3)

    def write_7(self, value: int) -> None:
        self.registers[7] = value

    def read(self, register: int) -> int:
        return int(getattr(self, f"read_{register}", lambda: self.registers[register])())

    def read_0(self) -> int:
        if self.dlab:
            return self.divisor % 256
        value = 0 if self.looks_empty() else self.queue.pop(0)
        self.interrupts += self.looks_empty() and self.enabled(2)
        return value

    def read_1(self) -> int:
        return self.divisor // 256 if self.dlab else self.registers[1] % 16

    def read_2(self) -> int:
        pending = 6 * (self.enabled(4) and self.overrun)
        pending |= 4 * (self.enabled(1) and len(self.queue) >= self.level)
        pending |= 2 * (self.enabled(2) and self.looks_empty())
        return 0xC0 | (pending or 1)

    def read_5(self) -> int:
        return (0x60 if self.looks_empty() else 0x01) + 2 * self.overrun

    def read_6(self) -> int:
        return 0xA2 if self.registers[4] & 0x20 and len(self.queue) >= self.limit else 0xB3

    def blob(self) -> bytes:
        head = self.written % 16
        tail = (self.written - len(self.queue)) % 16
        state = (head, tail, len(self.queue), self.dlab, self.overrun, 0, self.divisor, self.fcr, self.limit, self.level, 0)
        return bytes(self.registers) + bytes(self.ring) + struct.pack("<6BH4B", *state)


def header(ports: int) -> bytes:
    return struct.pack("<QIIII", 0x7E9D09898C3E2C4E, 1, 0, ports, 0)


#: Values that do something in some register, and any.
VALUES = st.sampled_from([0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x07, 0x08, 0x0B, 0x0F, 0x20, 0x80, 0x87, 0xC1]) | st.integers(0, 255)
#: What is done to which register of which port, with which values: one access each.
STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, 7), st.lists(VALUES, min_size=1, max_size=1)),
    st.tuples(st.just("write"), st.integers(0, 1), st.just(0), st.lists(VALUES, min_size=1, max_size=18)),
    st.tuples(st.just("read"), st.integers(0, 1), st.just(0), st.lists(st.just(0), min_size=1, max_size=18)),
    st.tuples(st.just("read"), st.integers(0, 1), st.integers(0, 7), st.just([0])),
    st.tuples(st.just("write"), st.integers(0, 1), st.just(3), st.just([0x03])),
    st.tuples(st.just("unmask"), st.just(0), st.just(0), st.just([0])),
)
PROGRAMS = st.lists(STEPS, max_size=60)
Program = list[tuple[str, int, int, list[int]]]


def compare(client: Any, index: Irq, program: Program) -> None:
    """Run a program on the card and on oracles: every value read, every interrupt, and at the end the state byte by byte."""
    client.restart()
    client.arm(index)
    oracles, masked = [Oracle(), Oracle()], False
    for action, port, register, values in program:
        for value in values:
            oracle = oracles[port]
            before = oracle.interrupts
            if action == "write":
                client.write(port, register, value)
                oracle.write(register, value)
            elif action == "read":
                assert client.read(port, register) == oracle.read(register)
            elif index is Irq.INTX:
                client.mask(False)
                masked = False
            events = oracle.interrupts - before
            if index is Irq.INTX:
                events, masked = (0 if masked else min(events, 1)), masked or bool(events)
            assert client.fired(index) == events
    assert client.device.state.save() == header(2) + b"".join(oracle.blob() for oracle in oracles)


@pytest.mark.parametrize("index", [Irq.INTX, Irq.MSI])
def test_any_accesses_give_what_the_sample_gives(connect: Callable[..., Any], index: Irq):
    client = connect(SampleDevice(2))

    @settings(max_examples=100, deadline=None)
    @given(PROGRAMS)
    def run(program: Program) -> None:
        compare(client, index, program)

    run()


def long_program(seed: int) -> Program:
    """Return 4,000 steps that keep the FIFOs between empty and overrun, where the quirks are."""
    chance = random.Random(seed)
    program: Program = []
    for _ in range(4000):
        port, many = chance.randrange(2), chance.choice([1, 1, 2, 15, 16, 17])
        action = chance.choice(["fill", "fill", "drain", "read", "write", "ready", "unmask"])
        if action == "fill":
            program.append(("write", port, 0, list(chance.randbytes(many))))
        elif action == "drain":
            program.append(("read", port, 0, [0] * many))
        elif action == "ready":
            program.append(("write", port, 3, [0x03]))
        else:
            program.append((action, port, chance.randrange(8), [chance.choice([0x01, 0x0F, 0x2B, chance.randrange(256)])]))
    return program


@pytest.mark.parametrize("index", [Irq.INTX, Irq.MSI])
def test_long_runs_give_what_the_sample_gives(connect: Callable[..., Any], index: Irq):
    compare(connect(SampleDevice(2)), index, long_program(int(index)))


def test_sixteen_bytes_look_like_none(sample: Any):
    """The reason why a stock driver hangs on it: its first full burst."""
    sample.write(0, 2, 0x01)
    sample.write(0, 1, 0x01)
    for value in range(15):
        sample.write(0, 0, value)
    assert (sample.read(0, 5), sample.read(0, 2)) == (0x01, 0xC4)
    sample.write(0, 0, 15)
    assert (sample.read(0, 5), sample.read(0, 2), sample.read(0, 0)) == (0x60, 0xC4, 0x00)
    sample.write(0, 0, 16)
    assert sample.read(0, 5) == 0x62
    assert sample.device.counters(0).overruns == 1


@pytest.mark.parametrize("size", [2, 4])
def test_a_wide_access_is_one_of_its_first_byte(sample: Any, size: int):
    sample.write(0, 4, 0x11223344, 4)
    assert sample.read(0, 4, size) == 0x44
    assert sample.read(0, 5) == 0x60
    sample.write(0, 0, 0x1122, 2)
    assert (sample.read(0, 0), sample.read(0, 5)) == (0x22, 0x60)


def test_an_access_over_all_registers_is_split_into_two(sample: Any):
    sample.device.write(0, 0, bytes([0x58, 0xFF, 0xFF, 0xFF, 0x0B, 0xFF, 0xFF, 0xFF]))
    assert (sample.read(0, 4), sample.read(0, 3), sample.read(0, 1)) == (0x0B, 0, 0)
    assert sample.device.read(0, 0, 8) == bytes([0x58, 0, 0, 0, 0x0B, 0, 0, 0])


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


def image(ports: int) -> bytes:
    space = bytearray(255)
    for offset, text in CONFIG.items():
        data = bytes.fromhex(text)
        space[offset : offset + len(data)] = data
    if ports == 1:
        space[0x14:0x18] = bytes(4)
    return bytes(space)


@pytest.mark.parametrize("ports", [1, 2])
def test_configuration_space_is_the_samples(connect: Callable[..., Any], ports: int):
    client = connect(SampleDevice(ports))
    assert client.device.region_info(7).size == 255
    assert client.config(0, 255) == image(ports)


@pytest.mark.parametrize("ports", [1, 2])
def test_configuration_space_is_written_as_the_samples(connect: Callable[..., Any], ports: int):
    """Of all four-byte writes, these few leave a trace."""
    client = connect(SampleDevice(ports))
    expected = bytearray(image(ports))
    for offset in range(0, 252, 4):
        client.write_config(offset, b"\xff\xff\xff\xff")
    for bar in (0x10, 0x14)[:ports]:
        expected[bar : bar + 4] = bytes.fromhex("f9ffffff")
    expected[0x3C] = 0xFF
    assert client.config(0, 255) == expected
    client.write_config(0x10, bytes.fromhex("00c00000"))
    client.write_config(0x14, bytes.fromhex("08c00000"))
    client.write_config(0x3C, b"\x0b")
    client.write_config(0x3D, b"\x02")
    client.write_config(0x12, b"\x34\x12")
    expected[0x10:0x14] = bytes.fromhex("01c00000")
    if ports == 2:
        expected[0x14:0x18] = bytes.fromhex("09c00000")
    expected[0x3C] = 0x0B
    assert client.config(0, 255) == expected


def test_both_base_addresses_in_one_write(sample: Any):
    sample.write_config(0x10, b"\xff" * 8)
    assert sample.config(0x10, 8) == bytes.fromhex("f9fffffff9ffffff")


def test_what_it_tells_about_itself(sample: Any):
    device = sample.device
    assert device.info().flags == Device.PCI
    assert [(device.irq_info(index).count, int(device.irq_info(index).flags)) for index in (0, 1)] == [(1, 7), (1, 9)]
    for index in (2, 3, 4):
        with pytest.raises(MdevError, match=f"no interrupt index {index}"):
            device.irq_info(index)
    regions = [device.region_info(index) for index in range(9)]
    assert [region.size for region in regions] == [8, 8, 0, 0, 0, 0, 0, 255, 0]
    assert {region.flags for region in regions} == {RegionFlag.READ | RegionFlag.WRITE}


def test_reset_touches_neither_ports_nor_configuration(sample: Any):
    sample.write(1, 7, 0x5A)
    sample.write_config(0x10, bytes.fromhex("00c00000"))
    sample.device.migration.set_state(MigrationState.STOP)
    sample.device.reset()
    assert sample.device.migration.state is MigrationState.RUNNING
    assert sample.read(1, 7) == 0x5A
    assert sample.config(0x10, 4) == bytes.fromhex("01c00000")


def test_the_next_client_sees_nothing_of_the_last(sample: Any):
    for port in (0, 1):
        sample.write(port, 0, 0x41)
        sample.write(port, 7, 0x5A)
    sample.restart()
    fresh = SampleDevice(2)
    assert sample.device.state.save() == fresh.state.save()
    assert sample.config(0, 255) == image(2)


def test_a_masked_pin_loses_the_event(sample: Any):
    sample.arm(Irq.INTX)
    sample.mask(True)
    sample.write(0, 1, 0x02)
    sample.mask(False)
    assert sample.fired(Irq.INTX) == 0
    sample.write(0, 1, 0x02)
    assert sample.fired(Irq.INTX) == 1


def test_it_is_always_looped_back(sample: Any):
    with pytest.raises(MdevError) as caught:
        sample.device.set_far_end(1, "pty")
    assert str(caught.value) == "port 1 of a device with compat=linux is always loopback, not pty"
    sample.device.set_far_end(1, "loopback")
    assert (sample.device.far_end(1), sample.device.far_end_path(1)) == ("loopback", "")
