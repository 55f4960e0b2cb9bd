"""What the card looks like from outside: PCI identity, UART registers, and the layouts of its state and of its migration stream.

Constants and structures only; nothing here runs, so any thread may use it. Register and bit names are those of Linux's
``serial_reg.h``; sections are those of the PC16550D data sheet (National Semiconductor, June 1995; TI SNLS378).

**Migration streams.** All integers are little endian and unpadded. Both start with a `Header`.

Major version 1 is the stream of the Linux sample, for devices with ``compat=linux``: the header and one `SamplePort` of
36 bytes per port, 60 or 96 bytes.

Major version 2 is the default device's, which has two FIFOs per port where the sample's structure has room for one:

====== ====== ==========================================================
offset bytes  content
====== ====== ==========================================================
0      24     `Header`, major 2, minor 0, flags 0
24     48 * n one `PortState` per port, port 0 first
24+48n 4      CRC-32 (that of zlib and Ethernet) of everything before it
====== ====== ==========================================================

which makes 76 or 124 bytes. Configuration space, BAR addresses, interrupts, far ends and byte counts do not migrate.
"""

from __future__ import annotations

import ctypes
from typing import Final

VENDOR_ID: Final = 0x4348
DEVICE_ID: Final = 0x3253
#: Serial controller, 16550 compatible.
CLASS_CODE: Final = 0x070002
REVISION: Final = 0x10
#: Size of each port's I/O BAR in bytes: one register per byte.
BAR_SIZE: Final = 8
#: Size of the sample's configuration space region: one byte short.
SAMPLE_CONFIG_SIZE: Final = 0xFF
#: The sample's bytes behind the standard header, and where they lie.
VENDOR_CONFIG: Final = ((0x40, b"\x23"), (0x43, b"\x80\x23"), (0x48, b"\x23"), (0x4C, b"\x23"), (0x60, b"PCI Serial/UART"))

# Register offsets (table II). A register that is two things is named by both.
RBR_THR: Final = 0
IER: Final = 1
IIR_FCR: Final = 2
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

# Interrupt enable (8.7).
IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IER_RLSI: Final = 0x04
IER_MSI: Final = 0x08
IER_MASK: Final = 0x0F

# Interrupt identification (8.6, table IV): the low four bits name one source.
IIR_MSI: Final = 0x00
IIR_NO_INT: Final = 0x01
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RLSI: Final = 0x06
IIR_TIMEOUT: Final = 0x0C
IIR_FIFOS: Final = 0xC0

# FIFO control (8.5).
FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
FCR_CLEAR_TX: Final = 0x04
FCR_DMA: Final = 0x08
FCR_TRIGGER_MASK: Final = 0xC0
#: Bits that stay; the others act once.
FCR_KEPT: Final = FCR_ENABLE | FCR_DMA | FCR_TRIGGER_MASK
#: Bytes at which received data interrupts, by FCR bits 7 and 6.
TRIGGER_LEVELS: Final = (1, 4, 8, 14)

# Line control (8.1).
LCR_DLAB: Final = 0x80

# Modem control (8.8). AFE is a 16C550's, known to the sample alone.
MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10
MCR_AFE: Final = 0x20
MCR_MASK: Final = 0x1F

# Line status (8.4).
LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40

# Modem status (8.9): lines in the high half, what changed in the low half.
MSR_DCTS: Final = 0x01
MSR_DDSR: Final = 0x02
MSR_TERI: Final = 0x04
MSR_DDCD: Final = 0x08
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
MSR_DELTAS: Final = 0x0F

#: Slots of every FIFO.
FIFO_SIZE: Final = 16

MAGIC: Final = 0x7E9D09898C3E2C4E
#: Major versions of the stream.
MAJOR_SAMPLE: Final = 1
MAJOR_OWN: Final = 2
MINOR: Final = 0


class Header(ctypes.LittleEndianStructure):
    """The first 24 bytes of either stream: all that a stream says before the device is stopped."""

    magic: int
    major: int
    minor: int
    nr_ports: int
    flags: int
    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("nr_ports", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class Fifo(ctypes.LittleEndianStructure):
    """A ring of 16 bytes: `count` bytes are queued, the oldest in slot `head`."""

    data: ctypes.Array[ctypes.c_uint8]
    head: int
    count: int
    _fields_ = (
        ("data", ctypes.c_uint8 * FIFO_SIZE),
        ("head", ctypes.c_uint8),
        ("count", ctypes.c_uint8),
    )


class PortState(ctypes.LittleEndianStructure):
    """One 16550A, 48 bytes.

    Registers are as a driver sees them, except: `fcr` holds the bits of `FCR_KEPT`, `lsr` the overrun bit alone (the rest
    follows from the FIFOs), and `thri` is 1 while the transmitter-empty interrupt is latched.
    """

    rx: Fifo
    tx: Fifo
    ier: int
    fcr: int
    lcr: int
    mcr: int
    lsr: int
    msr: int
    scr: int
    thri: int
    dll: int
    dlm: int
    reserved: int
    _fields_ = (
        ("rx", Fifo),
        ("tx", Fifo),
        ("ier", ctypes.c_uint8),
        ("fcr", ctypes.c_uint8),
        ("lcr", ctypes.c_uint8),
        ("mcr", ctypes.c_uint8),
        ("lsr", ctypes.c_uint8),
        ("msr", ctypes.c_uint8),
        ("scr", ctypes.c_uint8),
        ("thri", ctypes.c_uint8),
        ("dll", ctypes.c_uint8),
        ("dlm", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
    )


class SamplePort(ctypes.LittleEndianStructure):
    """One port of the Linux sample, 36 bytes: the members of its C structure, padding made explicit.

    `head` is where the next byte goes, `tail` where the oldest is; head equal to tail reads as empty even when `count` is 16.
    """

    uart_reg: ctypes.Array[ctypes.c_uint8]
    fifo: ctypes.Array[ctypes.c_uint8]
    head: int
    tail: int
    count: int
    dlab: int
    overrun: int
    pad0: int
    divisor: int
    fcr: int
    max_fifo: int
    trigger: int
    pad1: int
    _fields_ = (
        ("uart_reg", ctypes.c_uint8 * 8),
        ("fifo", ctypes.c_uint8 * FIFO_SIZE),
        ("head", ctypes.c_uint8),
        ("tail", ctypes.c_uint8),
        ("count", ctypes.c_uint8),
        ("dlab", ctypes.c_uint8),
        ("overrun", ctypes.c_uint8),
        ("pad0", ctypes.c_uint8),
        ("divisor", ctypes.c_uint16),
        ("fcr", ctypes.c_uint8),
        ("max_fifo", ctypes.c_uint8),
        ("trigger", ctypes.c_uint8),
        ("pad1", ctypes.c_uint8),
    )


class Counters(ctypes.LittleEndianStructure):
    """What a port has done since the device was created; kept beside the ports' state, and not part of a stream."""

    #: Bytes that left through the transmitter.
    tx: int
    #: Bytes that came in through the receiver.
    rx: int
    #: Bytes the guest wrote although the transmitter had no room; they are lost.
    overruns: int
    _fields_ = (
        ("tx", ctypes.c_uint64),
        ("rx", ctypes.c_uint64),
        ("overruns", ctypes.c_uint64),
    )
