"""A port as the Linux sample has it, mistakes included: what ``compat=linux`` gives a guest. It knows no bus and no thread.

It differs from a 16550A (`mdevkit_mtty.uart`) in these points, and a stock driver that writes 16 bytes at once hangs on it:

- one FIFO; what is transmitted is what is received, always, and the loop-back bit of MCR means nothing;
- "empty" compares the two ends of a ring of 16, so 16 queued bytes look like none, and cannot be read;
- interrupts are events: one is raised when something happens, and none is remembered;
- IIR ORs its sources, LSR keeps the overrun until the next byte fits, MSR's changes never clear;
- the divisor is ORed, not stored; the trigger level is 1 whatever FCR says, and 0 until FCR is written.

All state lives in the `SamplePort` it is given. Nothing here locks: the owner calls one method at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

from mdevkit_mtty.regs import (
    FCR_CLEAR_RX,
    FCR_CLEAR_TX,
    FCR_ENABLE,
    FIFO_SIZE,
    IER,
    IER_MASK,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_FCR,
    IIR_FIFOS,
    IIR_NO_INT,
    IIR_RDI,
    IIR_RLSI,
    IIR_THRI,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_DR,
    LSR_OE,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MCR_AFE,
    MCR_DTR,
    MCR_OUT2,
    MCR_RTS,
    MSR,
    MSR_CTS,
    MSR_DCD,
    MSR_DCTS,
    MSR_DDSR,
    MSR_DSR,
    RBR_THR,
    Counters,
    SamplePort,
)

_MSR_ALWAYS: Final = MSR_DCD | MSR_DSR | MSR_DDSR
_SLOT: Final = FIFO_SIZE - 1


class SampleUart:
    """One port over the memory `state`, as it stands: `reset` powers it on. `interrupt` is called at each interrupt event."""

    def __init__(self, state: SamplePort, counters: Counters, interrupt: Callable[[], None]) -> None:
        self.state = state
        self.counters = counters
        self._interrupt = interrupt

    def reset(self) -> None:
        """Return to the state after create."""
        ctypes.memset(ctypes.addressof(self.state), 0, ctypes.sizeof(self.state))
        self.state.max_fifo = FIFO_SIZE

    @property
    def _empty(self) -> bool:
        return self.state.head == self.state.tail

    def _enabled(self, source: int) -> bool:
        return bool(self.state.uart_reg[IER] & source)

    def read(self, offset: int) -> int:
        """Read the register at `offset` (0 to 7)."""
        state = self.state
        if offset == RBR_THR:
            return state.divisor & 0xFF if state.dlab else self._pop()
        if offset == IER:
            return state.divisor >> 8 if state.dlab else state.uart_reg[IER] & IER_MASK
        if offset == IIR_FCR:
            return self._iir()
        if offset == LSR:
            return self._lsr()
        if offset == MSR:
            return self._msr()
        return state.uart_reg[offset]

    def write(self, offset: int, value: int) -> None:
        """Write `value` (0 to 255) to the register at `offset` (0 to 7)."""
        state = self.state
        if offset == RBR_THR:
            self._write_thr(value)
        elif offset == IER:
            self._write_ier(value)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            state.uart_reg[LCR] = value
            state.dlab = value >> 7
            state.divisor = 0 if value & LCR_DLAB else state.divisor
        elif offset == MCR:
            self._write_mcr(value)
        elif offset not in {LSR, MSR}:
            state.uart_reg[offset] = value

    def _pop(self) -> int:
        state = self.state
        value = 0
        if not self._empty:
            value = state.fifo[state.tail]
            state.tail = (state.tail + 1) & _SLOT
            state.count -= 1
            self.counters.rx += 1
        if self._empty and self._enabled(IER_THRI):
            self._interrupt()
        return value

    def _write_thr(self, value: int) -> None:
        state = self.state
        if state.dlab:
            state.divisor |= value
        elif state.count < state.max_fifo:
            self._push(value)
        else:
            state.overrun = 1
            self.counters.overruns += 1
            if self._enabled(IER_RLSI):
                self._interrupt()

    def _push(self, value: int) -> None:
        state = self.state
        state.fifo[state.head] = value
        state.head = (state.head + 1) & _SLOT
        state.count += 1
        state.overrun = 0
        self.counters.tx += 1
        if self._enabled(IER_RDI) and state.count == state.trigger:
            self._interrupt()

    def _write_ier(self, value: int) -> None:
        state = self.state
        if state.dlab:
            state.divisor |= value << 8
            return
        state.uart_reg[IER] = value
        if value & IER_THRI and self._empty:
            self._interrupt()

    def _write_fcr(self, value: int) -> None:
        state = self.state
        state.fcr = value
        if value & (FCR_CLEAR_RX | FCR_CLEAR_TX):
            state.count = state.head = state.tail = 0
        state.trigger = 1
        state.max_fifo = FIFO_SIZE if value & FCR_ENABLE else 1

    def _write_mcr(self, value: int) -> None:
        self.state.uart_reg[MCR] = value
        if self._enabled(IER_MSI):
            for outputs in (MCR_OUT2, MCR_RTS | MCR_DTR):
                if value & outputs:
                    self._interrupt()

    def _iir(self) -> int:
        state = self.state
        value = IIR_RLSI if self._enabled(IER_RLSI) and state.overrun else 0
        if self._enabled(IER_RDI) and state.count >= state.trigger:
            value |= IIR_RDI
        if self._enabled(IER_THRI) and self._empty:
            value |= IIR_THRI
        return (value or IIR_NO_INT) | IIR_FIFOS

    def _lsr(self) -> int:
        return (LSR_TEMT | LSR_THRE if self._empty else LSR_DR) | (LSR_OE if self.state.overrun else 0)

    def _msr(self) -> int:
        state = self.state
        if state.uart_reg[MCR] & MCR_AFE and state.count >= state.max_fifo:
            return _MSR_ALWAYS
        return _MSR_ALWAYS | MSR_CTS | MSR_DCTS
