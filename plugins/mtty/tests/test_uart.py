"""The 16550A, register by register, against its data sheet and against what the stock Linux driver expects."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit_mtty import regs
from mdevkit_mtty.uart import Uart

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7


class Cable:
    """A wire whose other end the test holds: `room` bytes fit, `incoming` waits, `carrier` is a switch."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.room = 1 << 20
        self.incoming = bytearray()
        self.carrier = True

    def send(self, data: bytes) -> int:
        taken = data[: self.room]
        self.sent += taken
        self.room -= len(taken)
        return len(taken)

    def receive(self, limit: int) -> bytes:
        data = bytes(self.incoming[:limit])
        del self.incoming[:limit]
        return data


def make(wire: Cable | None = None) -> Uart:
    uart = Uart(regs.PortState(), regs.Counters(), wire)
    uart.reset()
    return uart


@pytest.fixture
def uart() -> Uart:
    """Looped, FIFOs on, trigger level 1."""
    uart = make()
    uart.write(FCR, 0x01)
    return uart


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def wired(cable: Cable) -> Uart:
    """On a cable, FIFOs on, trigger level 8, ready to receive."""
    uart = make(cable)
    uart.write(FCR, 0x81)
    uart.write(MCR, 0x0B)
    return uart


def drain(uart: Uart) -> bytes:
    data = bytearray()
    while uart.read(LSR) & regs.LSR_DR:
        data.append(uart.read(DATA))
    return bytes(data)


#: Every access the stock 8250 driver makes to one port while it is probed, opened, used for one byte and closed;
#: (register, written) or (register, None, what the driver must read).
PROBE_AND_OPEN = [
    (MCR, 0x00),
    (MSR, None, 0xB0),
    # serial8250_do_startup: clear the FIFOs, clear the interrupts
    (FCR, 0x01),
    (FCR, 0x07),
    (FCR, 0x00),
    (LSR, None, 0x60),
    (DATA, None, 0x00),
    (IIR, None, 0x01),
    (MSR, None, 0xB0),
    (LSR, None, 0x60),
    (LSR, None, 0x60),
    # the test for chips that do not raise the transmitter's interrupt again
    (IER, 0x02),
    (IIR, None, 0x02),
    (IER, 0x00),
    (IER, 0x02),
    (IIR, None, 0x02),
    (IER, 0x00),
    (LCR, 0x03),
    (MCR, 0x08),
    # the test for chips whose interrupt does not work at all
    (IER, 0x02),
    (LSR, None, 0x60),
    (IIR, None, 0x02),
    (IER, 0x00),
    (LSR, None, 0x60),
    (DATA, None, 0x00),
    (IIR, None, 0x01),
    (MSR, None, 0xB0),
    (IER, 0x05),
    # set_termios: 115200 baud, 8 data bits, trigger level 8
    (LCR, 0x93),
    (DATA, 0x01),
    (IER, 0x00),
    (LCR, 0x13),
    (FCR, 0x01),
    (FCR, 0x81),
    (MCR, 0x0B),
]
ONE_BYTE = [
    (IER, 0x07),
    (IIR, None, 0xC2),
    (LSR, None, 0x60),
    (DATA, 0x58),
    (IIR, None, 0xCC),
    (LSR, None, 0x61),
    (DATA, None, 0x58),
    (LSR, None, 0x60),
    (IIR, None, 0xC2),
    (IER, 0x05),
    (IIR, None, 0xC1),
]
CLOSE = [(IER, 0x00), (FCR, 0x01), (FCR, 0x07), (FCR, 0x00), (DATA, None, 0x00), (LSR, None, 0x60), (IIR, None, 0x01)]


def test_the_stock_driver_reads_what_it_expects_twice_over():
    uart = make()
    for number, step in enumerate((PROBE_AND_OPEN + ONE_BYTE + CLOSE) * 2):
        register, value, *expected = step
        if expected:
            assert (number, register, uart.read(register)) == (number, register, *expected)
        else:
            uart.write(register, value)
    assert uart.state.dll == 1
    assert uart.state.dlm == 0


def test_reset_gives_the_power_on_values_of_table_1():
    uart = make()
    for offset in range(8):
        uart.write(offset, 0xFF)
    uart.reset()
    assert [uart.read(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert not uart.interrupt


def test_the_divisor_latch_hides_data_and_interrupt_enable(uart: Uart):
    uart.write(LCR, 0x83)
    uart.write(DATA, 0x34)
    uart.write(IER, 0x12)
    assert (uart.read(DATA), uart.read(IER), uart.read(LSR)) == (0x34, 0x12, 0x60)
    uart.write(LCR, 0x03)
    assert (uart.read(DATA), uart.read(IER)) == (0, 0)


@pytest.mark.parametrize(("register", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_registers_keep_the_bits_they_have(uart: Uart, register: int, kept: int):
    for value in range(256):
        uart.write(LCR, 0)
        uart.write(register, value)
        assert uart.read(register) == value & kept


@pytest.mark.parametrize("register", [LSR, MSR])
def test_status_registers_cannot_be_written(uart: Uart, register: int):
    before = uart.read(register)
    uart.write(register, ~before & 0xFF)
    assert uart.read(register) == before


def test_fifos_are_reported_only_while_enabled():
    uart = make()
    assert uart.read(IIR) == 0x01
    uart.write(FCR, 0x01)
    assert uart.read(IIR) == 0xC1
    uart.write(FCR, 0xC0)
    assert uart.read(IIR) == 0x01


def test_without_the_enable_bit_no_other_bit_of_fcr_counts():
    """8.5: bit 0 must be set or the other bits are not programmed."""
    uart = make()
    uart.write(DATA, 1)
    uart.write(FCR, 0x06)
    assert uart.read(LSR) == 0x61


def test_one_byte_each_way_in_16450_mode():
    uart = make()
    for value in (1, 2, 3):
        uart.write(DATA, value)
    assert uart.counters.overruns == 1
    assert uart.read(LSR) == 0x03
    assert drain(uart) == b"\1\2"


def test_thirty_two_bytes_in_the_loop_and_the_next_is_an_overrun(uart: Uart):
    for value in range(32):
        uart.write(DATA, value)
    assert uart.read(LSR) == 0x01
    uart.write(DATA, 0xEE)
    assert uart.read(LSR) == 0x03
    assert uart.read(LSR) == 0x01, "reading clears the overrun (8.4)"
    assert drain(uart) == bytes(range(32))
    assert uart.read(LSR) == 0x60
    assert (uart.counters.tx, uart.counters.rx, uart.counters.overruns) == (32, 32, 1)


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_levels_and_the_time_out_below_them(uart: Uart, bits: int, level: int):
    uart.write(FCR, 0x01 | bits)
    uart.write(IER, 0x01)
    for count in range(1, 17):
        uart.write(DATA, count)
        assert uart.read(IIR) == (0xC4 if count >= level else 0xCC)
        assert uart.interrupt
    for left in range(15, -1, -1):
        uart.read(DATA)
        assert uart.read(IIR) == (0xC4 if left >= level else 0xCC if left else 0xC1)
    assert not uart.interrupt


def test_interrupts_are_told_in_order_of_priority(uart: Uart):
    uart.write(IER, 0x0F)
    for value in range(33):
        uart.write(DATA, value)
    uart.write(MCR, 0x10)  # the modem's lines fall
    assert uart.read(IIR) == 0xC6
    uart.read(LSR)
    assert uart.read(IIR) == 0xC4
    drain(uart)
    assert uart.read(IIR) == 0xC2
    assert uart.read(IIR) == 0xC0
    uart.read(MSR)
    assert uart.read(IIR) == 0xC1
    assert not uart.interrupt


def test_reading_iir_clears_the_transmitter_only_when_it_is_what_is_told(uart: Uart):
    uart.write(IER, 0x03)
    uart.write(DATA, 1)
    assert uart.read(IIR) == 0xC4
    uart.read(DATA)
    assert uart.read(IIR) == 0xC2
    assert uart.read(IIR) == 0xC1


def test_the_transmitters_interrupt_comes_with_each_enabling_and_not_with_a_second_write(uart: Uart):
    for _ in range(3):
        uart.write(IER, 0x00)
        uart.write(IER, 0x02)
        assert uart.read(IIR) == 0xC2
        uart.write(IER, 0x02)
        assert uart.read(IIR) == 0xC1


def test_the_transmitters_interrupt_waits_until_the_far_end_has_taken_all(wired: Uart, cable: Cable):
    cable.room = 5
    wired.write(IER, 0x02)
    for value in range(16):
        wired.write(DATA, value)
    assert wired.read(LSR) == 0
    assert not wired.interrupt
    cable.room = 10
    wired.pump()
    assert (wired.read(LSR), wired.interrupt) == (0, False)
    cable.room = 10
    wired.pump()
    assert (wired.read(LSR), wired.read(IIR)) == (0x60, 0xC2)
    assert cable.sent == bytes(range(16))


def test_clearing_fifos_clears_one_each(wired: Uart, cable: Cable):
    cable.room = 0
    cable.incoming += b"abc"
    wired.pump()
    wired.write(DATA, 1)
    wired.write(FCR, 0x83)
    assert wired.read(LSR) == 0
    cable.incoming += b"def"
    wired.pump()
    wired.write(FCR, 0x85)
    assert wired.read(LSR) == 0x61
    assert drain(wired) == b"def"
    cable.room = 1
    wired.pump()
    assert cable.sent == b""


def test_leaving_fifo_mode_empties_both(wired: Uart, cable: Cable):
    cable.room = 0
    cable.incoming += b"abc"
    wired.pump()
    wired.write(DATA, 1)
    wired.write(FCR, 0)
    assert wired.read(LSR) == 0x60


def test_the_first_interrupt_after_changing_the_mode_is_immediate():
    """8.11: the transmitter's, if it is enabled."""
    uart = make()
    uart.write(IER, 0x02)
    assert uart.read(IIR) == 0x02
    uart.write(FCR, 0x01)
    assert uart.read(IIR) == 0xC2


def test_bytes_wait_at_the_far_end_until_the_guest_requests_to_send(cable: Cable):
    uart = make(cable)
    cable.incoming += b"early"
    uart.pump()
    uart.write(FCR, 0x07)
    assert uart.read(LSR) == 0x60
    uart.write(MCR, 0x02)
    assert drain(uart) == b"early"


def test_a_full_receiver_holds_the_far_end_off(wired: Uart, cable: Cable):
    cable.incoming += bytes(range(100))
    wired.pump()
    assert len(cable.incoming) == 84
    wired.pump()
    assert len(cable.incoming) == 84
    assert drain(wired) == bytes(range(100))


def test_the_chips_loop_back_cuts_the_cable_off(wired: Uart, cable: Cable):
    """8.8 bit 4: the transmitter feeds the receiver, and the modem inputs are the modem outputs."""
    wired.write(MCR, 0x1B)
    cable.incoming += b"outside"
    for value in b"inside":
        wired.write(DATA, value)
    assert drain(wired) == b"inside"
    assert cable.sent == b""
    wired.write(MCR, 0x0B)
    assert drain(wired) == b"outside"


@pytest.mark.parametrize("outputs", range(16))
def test_modem_inputs_follow_the_outputs_in_loop_back(uart: Uart, outputs: int):
    expected = {0: (0x02, 0x10), 1: (0x01, 0x20), 2: (0x04, 0x40), 3: (0x08, 0x80)}
    uart.write(MCR, 0x10)
    uart.read(MSR)
    uart.write(MCR, 0x10 | outputs)
    lines = sum(line for output, line in expected.values() if outputs & output)
    rises = (bool(outputs & 2) * 0x01) | (bool(outputs & 1) * 0x02) | (bool(outputs & 8) * 0x08)
    assert uart.read(MSR) == lines | rises, "ring indicator has no delta when it rises (8.9)"
    uart.write(MCR, 0x10)
    falls = rises | (bool(outputs & 4) * 0x04)
    assert uart.read(MSR) == falls
    assert uart.read(MSR) == 0


def test_losing_the_carrier_interrupts_and_shows(wired: Uart, cable: Cable):
    wired.write(IER, 0x08)
    assert not wired.interrupt
    cable.carrier = False
    wired.pump()
    assert wired.read(IIR) == 0xC0
    assert wired.read(MSR) == 0x38
    assert wired.read(IIR) == 0xC1
    assert wired.read(MSR) == 0x30
    cable.carrier = True
    assert wired.read(MSR) == 0xB8


class Driver:
    """The stock driver's interrupt handler and transmit path, over any number of bytes."""

    def __init__(self, uart: Uart, data: bytes) -> None:
        self.uart = uart
        self.pending = bytearray(data)
        self.received = bytearray()

    def interrupt(self) -> None:
        if self.uart.read(IIR) & 1:
            return
        status = self.uart.read(LSR)
        for _ in range(256):
            if not status & 0x01:
                break
            self.received.append(self.uart.read(DATA))
            status = self.uart.read(LSR)
        self.uart.read(MSR)
        if status & 0x20 and self.uart.read(IER) & 0x02:
            self.transmit()

    def transmit(self) -> None:
        for value in self.pending[:16]:
            self.uart.write(DATA, value)
        del self.pending[:16]
        if not self.pending:
            self.uart.write(IER, 0x05)


@pytest.mark.parametrize("trigger", [0x01, 0x41, 0x81, 0xC1])
def test_an_interrupt_driver_moves_4_kib_through_the_loop(trigger: int):
    data = random.Random(trigger).randbytes(4096)
    uart = make()
    uart.write(FCR, trigger)
    driver = Driver(uart, data)
    uart.write(IER, 0x07)
    while uart.interrupt:
        driver.interrupt()
    assert driver.received == data


ACCESSES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.just(DATA), st.integers(0, 255)),
        st.tuples(st.just("burst"), st.just(DATA), st.integers(1, 40)),
        st.tuples(st.just("read"), st.sampled_from([DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR]), st.just(0)),
        st.tuples(st.just("drain"), st.just(DATA), st.integers(1, 40)),
        st.tuples(st.just("write"), st.just(IER), st.integers(0, 255)),
        st.tuples(st.just("write"), st.just(FCR), st.sampled_from([0x01, 0x41, 0x81, 0xC1, 0x09])),
        st.tuples(st.just("write"), st.just(LCR), st.integers(0, 127)),
        st.tuples(st.just("write"), st.just(MCR), st.integers(0, 255)),
        st.tuples(st.just("write"), st.sampled_from([LSR, MSR, SCR]), st.integers(0, 255)),
    ),
    max_size=150,
)


@settings(max_examples=150, deadline=None)
@given(ACCESSES)
def test_nothing_is_lost_or_reordered_in_the_loop(program: list[tuple[str, int, int]]):
    """Any program that leaves the FIFOs on and does not clear them: what went in comes out, and interrupts tell the truth."""
    uart = make()
    uart.write(FCR, 0x01)
    accepted, returned = bytearray(), bytearray()
    fresh = iter(range(1 << 20))

    def send(value: int) -> None:
        lost = uart.counters.overruns
        uart.write(DATA, value)
        if uart.counters.overruns == lost:
            accepted.append(value)

    def receive() -> None:
        if uart.read(LSR) & 1:
            returned.append(uart.read(DATA))

    for action, register, value in program:
        if action == "burst":
            for _ in range(value):
                send(next(fresh) & 0xFF)
        elif action == "drain":
            for _ in range(value):
                receive()
        elif register == DATA:
            send(value) if action == "write" else receive()
        elif action == "write":
            uart.write(register, value)
        else:
            level = uart.interrupt
            read = uart.read(register)
            assert register != IIR or bool(read & 1) != level
    while uart.read(LSR) & 1:
        receive()
    assert returned == accepted
    assert uart.read(LSR) == 0x60
