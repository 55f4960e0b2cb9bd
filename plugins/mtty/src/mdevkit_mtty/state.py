"""The card's state in one piece of memory, and its migration stream.

Header, ports and byte counts lie one behind the other in a buffer of fixed size, so that the state can be kept elsewhere
(a memfd), and so that saving is copying. The layouts are those of `mdevkit_mtty.regs`. Streams come from strangers: `load`
believes nothing, and changes nothing unless all of it is good. Callers hold the device's lock.
"""

from __future__ import annotations

import ctypes
import errno
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Final, Generic, NoReturn, TypeVar

from mdevkit.errors import MdevError

from mdevkit_mtty.regs import (
    FCR_ENABLE,
    FCR_KEPT,
    FIFO_SIZE,
    IER_MASK,
    LCR,
    LSR_OE,
    MAGIC,
    MAJOR_OWN,
    MAJOR_SAMPLE,
    MCR_MASK,
    MINOR,
    Counters,
    Header,
    PortState,
    SamplePort,
)

P = TypeVar("P", bound=ctypes.Structure)

HEADER_SIZE: Final = ctypes.sizeof(Header)


def _port_faults(port: PortState) -> dict[str, bool]:
    """Return what could be wrong with a port of ours, and whether it is."""
    capacity = FIFO_SIZE if port.fcr & FCR_ENABLE else 1
    return {
        "FCR": bool(port.fcr & ~FCR_KEPT) or 0 < port.fcr != port.fcr | FCR_ENABLE,
        "head of the receive FIFO": port.rx.head >= FIFO_SIZE,
        "count of the receive FIFO": port.rx.count > capacity,
        "head of the transmit FIFO": port.tx.head >= FIFO_SIZE,
        "count of the transmit FIFO": port.tx.count > capacity,
        "IER": bool(port.ier & ~IER_MASK),
        "MCR": bool(port.mcr & ~MCR_MASK),
        "LSR": bool(port.lsr & ~LSR_OE),
        "transmitter interrupt": port.thri > (0 if port.tx.count else 1),
        "reserved field": bool(port.reserved),
    }


def _sample_faults(port: SamplePort) -> dict[str, bool]:
    """Return what could be wrong with a port of the sample's, and whether it is. Data, divisor and SCR may be anything."""
    stored = {1, 3, 4, 7}  # IER, LCR, MCR and SCR: the other registers are not kept in the register file
    written = 1 if port.trigger else 0
    return {
        "register file": any(port.uart_reg[offset] for offset in range(8) if offset not in stored),
        "head": port.head >= FIFO_SIZE or port.head != (port.tail + port.count) % FIFO_SIZE,
        "tail": port.tail >= FIFO_SIZE,
        "count": port.count > FIFO_SIZE,
        "dlab": port.dlab != port.uart_reg[LCR] >> 7,
        "overrun": port.overrun > 1,
        "trigger level": port.trigger > 1,
        "fcr": not written and port.fcr != 0,
        "FIFO size": port.max_fifo != (FIFO_SIZE if port.fcr & FCR_ENABLE or not written else 1),
        "padding": bool(port.pad0 or port.pad1),
    }


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _no_trailer(_content: bytes) -> bytes:
    return b""


@dataclass(frozen=True)
class Format(Generic[P]):
    """One kind of stream: its major version, a port's structure, what can be wrong with one, and what is put behind all."""

    major: int
    port: type[P]
    faults: Callable[[P], dict[str, bool]]
    trailer: Callable[[bytes], bytes]


#: The default device's stream.
OWN: Final = Format(MAJOR_OWN, PortState, _port_faults, _crc)
#: The Linux sample's stream.
SAMPLE: Final = Format(MAJOR_SAMPLE, SamplePort, _sample_faults, _no_trailer)


def _refuse(number: int, sentence: str) -> NoReturn:
    raise MdevError(number, f"migration stream: {sentence}")


class CardState(Generic[P]):
    """State of a card with `nr_ports` ports, in `memory` (all zero at first) or in memory of its own."""

    def __init__(self, kind: Format[P], nr_ports: int, memory: bytearray | mmap | None = None) -> None:
        self.kind = kind
        port_size, counter_size = ctypes.sizeof(kind.port), ctypes.sizeof(Counters)
        self._saved = HEADER_SIZE + nr_ports * port_size
        self.memory = bytearray(self._saved + nr_ports * counter_size) if memory is None else memory
        self.header = Header.from_buffer(self.memory)
        self.ports = [kind.port.from_buffer(self.memory, HEADER_SIZE + n * port_size) for n in range(nr_ports)]
        self.counters = [Counters.from_buffer(self.memory, self._saved + n * counter_size) for n in range(nr_ports)]
        self.header.magic, self.header.major, self.header.minor = MAGIC, kind.major, MINOR
        self.header.nr_ports, self.header.flags = nr_ports, 0

    @property
    def stream_size(self) -> int:
        """Length of the whole stream in bytes."""
        return self._saved + len(self.kind.trailer(b""))

    def save_header(self) -> bytes:
        """Return the part of the stream that does not change while the device runs."""
        return bytes(self.header)

    def save(self) -> bytes:
        """Return the whole stream."""
        content = bytes(self.memory[: self._saved])
        return content + self.kind.trailer(content)

    def check_header(self, header: bytes) -> None:
        """Refuse a stream for another device by its first 24 bytes: EFAULT, as the sample does."""
        if bytes(header) == bytes(self.header):
            return
        other = Header.from_buffer_copy(header)
        facts = (
            ("magic number", f"{other.magic:#x}", f"{MAGIC:#x}"),
            ("version", f"{other.major}.{other.minor}", f"{self.kind.major}.{MINOR}"),
            ("number of ports", other.nr_ports, len(self.ports)),
            ("flags", other.flags, 0),
        )
        wrong = next(fact for fact in facts if fact[1] != fact[2])
        _refuse(errno.EFAULT, f"{wrong[0]} {wrong[1]}, but this device takes {wrong[2]} only")

    def load(self, stream: bytes) -> None:
        """Take over `stream`, or leave everything as it is: EFAULT for a header not ours, EINVAL for anything else."""
        self.check(stream)
        self.memory[: self._saved] = stream[: self._saved]

    def restore(self, memory: bytes) -> None:
        """Take over the memory of the same card in another process, counts included; EINVAL for another card's."""
        if len(memory) != len(self.memory) or memory[:HEADER_SIZE] != bytes(self.header):
            raise MdevError(errno.EINVAL, f"{len(memory)} bytes are not the memory of this card")
        self.memory[:] = memory

    def check(self, stream: bytes) -> None:
        """Raise what `load` would raise."""
        if len(stream) != self.stream_size:
            _refuse(errno.EINVAL, f"{len(stream)} bytes, but this device takes {self.stream_size}")
        self.check_header(stream[:HEADER_SIZE])
        content = bytes(stream[: self._saved])
        if stream[self._saved :] != self.kind.trailer(content):
            _refuse(errno.EINVAL, "the checksum is wrong")
        for number in range(len(self.ports)):
            self._check_port(number, content)

    def _check_port(self, number: int, content: bytes) -> None:
        port = self.kind.port.from_buffer_copy(content, HEADER_SIZE + number * ctypes.sizeof(self.kind.port))
        for fault, found in self.kind.faults(port).items():
            if found:
                _refuse(errno.EINVAL, f"port {number}: {fault} out of range")
