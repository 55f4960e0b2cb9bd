"""A 16550A by its data sheet: registers, two FIFOs, one interrupt line. It knows no bus and no thread.

All state lives in the `PortState` it is given, so that whoever owns the memory can save, load or park it. What the
transmitter drives and the receiver hears is a `Wire`. Nothing here locks: the owner calls one method at a time.

Time does not exist in this model, with these consequences. Bytes move as soon as there is room for them, whatever the
baud rate; a receiver with no room holds the sender off, so no received byte is ever lost. The character time-out (8.11),
which says "less than the trigger level came, and then nothing for four characters", holds whenever less than the trigger
level is there. Word length, parity and break have no effect: bytes travel whole.

Sections are those of the PC16550D data sheet.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

from mdevkit_mtty.regs import (
    FCR_CLEAR_RX,
    FCR_CLEAR_TX,
    FCR_ENABLE,
    FCR_KEPT,
    FIFO_SIZE,
    IER,
    IER_MASK,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_FCR,
    IIR_FIFOS,
    IIR_MSI,
    IIR_NO_INT,
    IIR_RDI,
    IIR_RLSI,
    IIR_THRI,
    IIR_TIMEOUT,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_DR,
    LSR_OE,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MCR_DTR,
    MCR_LOOP,
    MCR_MASK,
    MCR_OUT1,
    MCR_OUT2,
    MCR_RTS,
    MSR,
    MSR_CTS,
    MSR_DCD,
    MSR_DELTAS,
    MSR_DSR,
    MSR_RI,
    MSR_TERI,
    RBR_THR,
    SCR,
    TRIGGER_LEVELS,
    Counters,
    Fifo,
    PortState,
)

_SLOT = FIFO_SIZE - 1


class Wire(Protocol):
    """The cable of a port. Called by `Uart` only, and never blocks."""

    @property
    def carrier(self) -> bool:
        """Whether somebody is at the other end: the data carrier detect line."""
        ...

    def send(self, data: bytes) -> int:
        """Take bytes from the transmitter, in order, and return how many; fewer than all means: not now."""
        ...

    def receive(self, limit: int) -> bytes:
        """Return up to `limit` bytes for the receiver, b"" when there are none now. What is returned is delivered."""
        ...


def push(fifo: Fifo, data: bytes) -> None:
    """Queue `data`; the caller has made sure there is room."""
    ring, end = fifo.data, fifo.head + fifo.count
    for index, value in enumerate(data, end):
        ring[index & _SLOT] = value
    fifo.count += len(data)


def peek(fifo: Fifo, limit: int) -> bytes:
    """Return up to `limit` of the oldest bytes and leave them queued."""
    head = fifo.head
    ring = bytes(fifo.data)
    return (ring + ring)[head : head + min(limit, fifo.count)]


def drop(fifo: Fifo, number: int) -> None:
    """Forget the `number` oldest bytes."""
    fifo.head = (fifo.head + number) & _SLOT
    fifo.count -= number


def clear(fifo: Fifo) -> None:
    """Forget everything."""
    fifo.head = fifo.count = 0


class Uart:
    """One port over the memory `state`, as it stands: `reset` powers it on. `wire` None is a plug that connects the
    transmitter with the receiver.
    """

    def __init__(self, state: PortState, counters: Counters, wire: Wire | None = None) -> None:
        self.state = state
        self.counters = counters
        self.wire = wire
        self._rx = state.rx
        self._tx = state.tx

    def reset(self) -> None:
        """Master reset (table I), and the registers it leaves alone set to 0; bytes in the FIFOs are gone."""
        ctypes.memset(ctypes.addressof(self.state), 0, ctypes.sizeof(self.state))
        self.state.msr = self._lines()

    # -- interrupts

    @property
    def interrupt(self) -> bool:
        """Level of the interrupt line: some enabled source is pending (8.6). OUT2 does not gate it, as on any PCI card."""
        return self._source() != IIR_NO_INT

    def _source(self) -> int:
        """Return the pending source of highest priority (table IV)."""
        state = self.state
        ier = state.ier
        if ier & IER_RLSI and state.lsr:
            return IIR_RLSI
        if ier & IER_RDI and self._rx.count:
            return IIR_RDI if self._rx.count >= self._trigger else IIR_TIMEOUT
        if ier & IER_THRI and state.thri:
            return IIR_THRI
        if ier & IER_MSI and state.msr & MSR_DELTAS:
            return IIR_MSI
        return IIR_NO_INT

    @property
    def _trigger(self) -> int:
        fcr = self.state.fcr
        return TRIGGER_LEVELS[fcr >> 6] if fcr & FCR_ENABLE else 1

    @property
    def _capacity(self) -> int:
        """Bytes each direction queues: 16, or the one holding register of a 16450."""
        return FIFO_SIZE if self.state.fcr & FCR_ENABLE else 1

    # -- register access

    def read(self, offset: int) -> int:
        """Read the register at `offset` (0 to 7), with everything a read does."""
        state = self.state
        if offset == LSR:
            return self._read_lsr()
        if offset == RBR_THR:
            return state.dll if state.lcr & LCR_DLAB else self._read_rbr()
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == MSR:
            return self._read_msr()
        if offset == IER:
            return state.dlm if state.lcr & LCR_DLAB else state.ier
        return {LCR: state.lcr, MCR: state.mcr, SCR: state.scr}[offset]

    def write(self, offset: int, value: int) -> None:
        """Write `value` (0 to 255) to the register at `offset` (0 to 7). LSR and MSR are read-only here."""
        state = self.state
        if offset == RBR_THR:
            self._write_thr_or_dll(value)
        elif offset == IER:
            self._write_ier_or_dlm(value)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            state.lcr = value
        elif offset == MCR:
            state.mcr = value & MCR_MASK
            self.pump()
        elif offset == SCR:
            state.scr = value

    def _read_rbr(self) -> int:
        fifo = self._rx
        if not fifo.count:
            return 0
        value = fifo.data[fifo.head]
        drop(fifo, 1)
        # Far ends are asked only when the FIFO has run dry: sixteen bytes cost them the same as one.
        if self._tx.count or not fifo.count:
            self.pump()
        return value

    def _read_lsr(self) -> int:
        """Line status (8.4): reading clears the overrun."""
        state = self.state
        value = state.lsr | (LSR_DR if self._rx.count else 0)
        state.lsr = 0
        return value if self._tx.count else value | LSR_THRE | LSR_TEMT

    def _read_iir(self) -> int:
        """Interrupt identification (8.6): reading clears the transmitter's interrupt if that is what it reports."""
        source = self._source()
        if source == IIR_THRI:
            self.state.thri = 0
        return source | IIR_FIFOS if self.state.fcr & FCR_ENABLE else source

    def _read_msr(self) -> int:
        """Modem status (8.9): reading clears what changed."""
        self._follow_lines()
        value = self.state.msr
        self.state.msr = value & ~MSR_DELTAS
        return value

    def _write_thr_or_dll(self, value: int) -> None:
        state = self.state
        if state.lcr & LCR_DLAB:
            state.dll = value
        elif self._tx.count < self._capacity:
            state.thri = 0
            push(self._tx, bytes((value,)))
            self._move()
        else:
            # The chip would lose the byte without a word; the overrun bit makes the loss visible, as the sample does.
            state.lsr = LSR_OE
            self.counters.overruns += 1

    def _write_ier_or_dlm(self, value: int) -> None:
        """Interrupt enable (8.7). Enabling the transmitter's interrupt while it is empty raises it, each time."""
        state = self.state
        if state.lcr & LCR_DLAB:
            state.dlm = value
            return
        if value & ~state.ier & IER_THRI and not self._tx.count:
            state.thri = 1
        state.ier = value & IER_MASK

    def _write_fcr(self, value: int) -> None:
        """FIFO control (8.5): without the enable bit no other bit counts; changing that bit empties both FIFOs."""
        state = self.state
        changed = (state.fcr ^ value) & FCR_ENABLE
        if not value & FCR_ENABLE:
            value = 0
        if changed or value & FCR_CLEAR_RX:
            clear(self._rx)
        if changed or (value & FCR_CLEAR_TX and self._tx.count):
            clear(self._tx)
            state.thri = 1
        state.fcr = value & FCR_KEPT
        self.pump()

    # -- the lines

    def _lines(self) -> int:
        """Return the modem's lines as they are now: the far end's, or in the chip's loop-back mode its own outputs (8.8 bit 4)."""
        mcr = self.state.mcr
        if not mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | (MSR_DCD if self.wire is None or self.wire.carrier else 0)
        pairs = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(line for output, line in pairs if mcr & output)

    def _follow_lines(self) -> None:
        """Note what changed on the lines (8.9); ring indicator counts only when it falls."""
        lines = self._lines()
        was = self.state.msr
        changed = (was ^ lines) >> 4
        if lines & MSR_RI:
            changed &= ~MSR_TERI
        self.state.msr = lines | (was & MSR_DELTAS) | changed

    # -- data

    def pump(self) -> None:
        """Move what can be moved, both ways, and follow the modem lines. For the owner to call when the wire has changed."""
        self._move()
        self._follow_lines()

    def _move(self) -> None:
        if self.wire is None or self.state.mcr & MCR_LOOP:
            self._loop()
        else:
            self._transmit(self.wire)
            self._receive(self.wire)

    def _loop(self) -> None:
        """Hand the transmitter's bytes to the receiver as far as it has room."""
        data = peek(self._tx, self._capacity - self._rx.count)
        if data:
            push(self._rx, data)
            self.counters.rx += len(data)
            self._sent(len(data))

    def _transmit(self, wire: Wire) -> None:
        if self._tx.count:
            self._sent(wire.send(peek(self._tx, FIFO_SIZE)))

    def _sent(self, number: int) -> None:
        """Note that the transmitter is rid of its `number` oldest bytes; the last one raises its interrupt (8.11)."""
        if number:
            drop(self._tx, number)
            self.counters.tx += number
            if not self._tx.count:
                self.state.thri = 1

    def _receive(self, wire: Wire) -> None:
        """Let bytes in while the guest asserts RTS: until its driver has opened the port they wait at the far end."""
        room = self._capacity - self._rx.count
        if room and self.state.mcr & MCR_RTS:
            data = wire.receive(room)
            if data:
                push(self._rx, data)
                self.counters.rx += len(data)
