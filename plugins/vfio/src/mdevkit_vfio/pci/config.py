"""Configuration space: bytes, each with a mask of what the guest may change (PCI Local Bus Specification 3.0, section 6).

Every rule of the specification that a write obeys - identity bytes that ignore it, base address registers that answer a
write of all ones with their size, status bits cleared by writing 1 - is a mask here, so an access of any offset and
length needs no special case and can never fail. Used under the device's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mdevkit_vfio.pci import regs
from mdevkit_vfio.pci.bars import Bar
from mdevkit_vfio.pci.regs import Command, Status


@dataclass(frozen=True)
class PciIds:
    """Who the function is: 16-bit ids, `class_code` of 24 bits (base class, sub-class, interface), 8-bit `revision`."""

    vendor: int
    device: int
    subsystem_vendor: int = 0
    subsystem_device: int = 0
    class_code: int = 0xFF0000
    revision: int = 0

    def __post_init__(self) -> None:
        widths = (("vendor", 16), ("device", 16), ("subsystem_vendor", 16), ("subsystem_device", 16))
        for name, bits in (*widths, ("class_code", 24), ("revision", 8)):
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} {value:#x} does not fit {bits} bits")


@dataclass(frozen=True)
class Capability:
    """One entry of the capability list (6.7): `id`, then `body` after the id and next-pointer bytes.

    `writable` has the bits of `body` the guest may change, shorter than `body` means that the rest is read-only. `offset`
    places it (0x40 to 0xfc, a multiple of 4); None takes the next free place.
    """

    id: int
    body: bytes = b""
    writable: bytes = b""
    offset: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.id <= 0xFF:
            raise ValueError(f"capability id {self.id:#x} does not fit 8 bits")
        if len(self.writable) > len(self.body):
            raise ValueError(f"capability {self.id:#x}: more writable bits than body")

    @classmethod
    def vendor(cls, data: bytes, writable: bytes = b"", offset: int | None = None) -> Capability:
        """Make a vendor-specific capability (id 9): `data` follows the length byte, which is filled in here."""
        return cls(regs.CAP_VENDOR, bytes([len(data) + 3]) + data, b"\0" + writable if writable else b"", offset)

    @property
    def size(self) -> int:
        """Length in configuration space, in bytes."""
        return 2 + len(self.body)


class PciConfig:
    """The configuration space of one function, `size` bytes long.

    `read` and `write` are the guest's accesses; `get` and `put` are the device's own; `define` lays registers out.
    """

    def __init__(self, size: int = regs.CONVENTIONAL_SIZE) -> None:
        if not regs.HEADER_SIZE <= size <= regs.EXTENDED_SIZE:
            raise ValueError(f"a configuration space of {size} bytes: {regs.HEADER_SIZE} to {regs.EXTENDED_SIZE} are possible")
        self.size: Final = size
        self._data = bytearray(size)
        self._power_on = bytearray(size)
        self._writable = bytearray(size)
        self._write_1_clears = bytearray(size)
        self._used = bytearray(b"\1" * regs.HEADER_SIZE + b"\0" * (size - regs.HEADER_SIZE))
        self._last_pointer = regs.CAPABILITY_LIST

    # -- layout -----------------------------------------------------------------------------------------------------

    def define(self, offset: int, size: int, value: int = 0, *, writable: int = 0, write_1_clears: int = 0) -> None:
        """Lay out a register: its value after power-on, the bits a guest may write, and those it clears by writing 1.

        ValueError if it does not lie within the space, OverflowError for a value that does not fit `size` bytes.
        """
        end = offset + size
        if offset < 0 or size < 1 or end > self.size:
            raise ValueError(f"register {offset:#x} of {size} bytes lies outside the configuration space")
        self._data[offset:end] = self._power_on[offset:end] = value.to_bytes(size, "little")
        self._writable[offset:end] = writable.to_bytes(size, "little")
        self._write_1_clears[offset:end] = write_1_clears.to_bytes(size, "little")

    def add_capability(self, capability: Capability) -> int:
        """Put `capability` at the end of the list; returns its offset. ValueError if there is no room for it."""
        offset = self._place(capability)
        self._used[offset : offset + capability.size] = b"\1" * capability.size
        self.define(offset, 2, capability.id)
        for position, byte in enumerate(capability.body):
            writable = capability.writable[position] if position < len(capability.writable) else 0
            self.define(offset + 2 + position, 1, byte, writable=writable)
        self.define(self._last_pointer, 1, offset)
        self._last_pointer = offset + 1
        status = self.get(regs.STATUS, 2) | Status.CAP_LIST
        self.define(regs.STATUS, 2, status, write_1_clears=Status.ERRORS)
        return offset

    def _place(self, capability: Capability) -> int:
        limit = min(self.size, regs.CONVENTIONAL_SIZE)
        places = range(regs.HEADER_SIZE, limit, 4) if capability.offset is None else (capability.offset,)
        for offset in places:
            inside = offset >= regs.HEADER_SIZE and offset + capability.size <= limit and not offset % 4
            if inside and not any(self._used[offset : offset + capability.size]):
                return offset
        where = "" if capability.offset is None else f" at {capability.offset:#x}"
        raise ValueError(f"no room for capability {capability.id:#x} of {capability.size} bytes{where}")

    def reset(self) -> None:
        """Every register back to its value after power-on."""
        self._data[:] = self._power_on

    def save(self) -> bytes:
        """Return every register."""
        return bytes(self._data)

    def load(self, state: bytes) -> None:
        """Take over what `save` of a space with the same layout returned."""
        self._data[:] = state

    # -- the guest's accesses ---------------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes; what lies beyond the end reads as zeros."""
        return bytes(self._data[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write what the masks let through; the rest is ignored, as PCI does."""
        for position, byte in enumerate(data, offset):
            if position >= self.size:
                break
            writable = self._writable[position]
            value = self._data[position] & ~writable | byte & writable
            self._data[position] = value & ~(byte & self._write_1_clears[position])

    # -- the device's own accesses ----------------------------------------------------------------------------------

    def get(self, offset: int, size: int) -> int:
        """Return the register of `size` bytes at `offset`."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set a register, read-only bits included, until the next write or reset."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    @property
    def command(self) -> Command:
        """The command register."""
        return Command(self.get(regs.COMMAND, 2))

    @property
    def bus_master(self) -> bool:
        """Whether the guest lets the device start DMA. The kit does not enforce it; a careful device asks."""
        return bool(self._data[regs.COMMAND] & Command.MASTER)

    @property
    def intx_disabled(self) -> bool:
        """The Interrupt Disable bit of the command register."""
        return bool(self.get(regs.COMMAND, 2) & Command.INTX_DISABLE)

    def set_interrupt_status(self, pending: bool) -> None:
        """Show the level of the pin in the status register, whether or not it is disabled (6.2.3)."""
        status = self._data[regs.STATUS]
        self._data[regs.STATUS] = status | Status.INTERRUPT if pending else status & ~Status.INTERRUPT

    def bar_address(self, index: int) -> int:
        """Return the address the guest gave base address register `index`, type bits removed; 0 if none yet."""
        offset = regs.BASE_ADDRESS_0 + 4 * index
        low = self.get(offset, 4)
        if low & regs.BAR_IO:
            return low & ~0x3
        high = self.get(offset + 4, 4) if low & regs.BAR_MEM64 else 0
        return high << 32 | low & ~0xF


def header(ids: PciIds, bars: Mapping[int, Bar], *, size: int, interrupt_pin: int = 0) -> PciConfig:
    """Build the configuration space of a function without capabilities. `interrupt_pin`: 0 none, 1 to 4 INTA to INTD."""
    if not 0 <= interrupt_pin <= 4:
        raise ValueError(f"interrupt pin {interrupt_pin}: 0 (none) to 4 (INTD) are possible")
    config = PciConfig(size)
    config.define(regs.VENDOR_ID, 2, ids.vendor)
    config.define(regs.DEVICE_ID, 2, ids.device)
    config.define(regs.COMMAND, 2, writable=_command_bits(bars, interrupt_pin))
    config.define(regs.STATUS, 2, write_1_clears=Status.ERRORS)
    config.define(regs.REVISION_ID, 1, ids.revision)
    config.define(regs.CLASS_PROG, 3, ids.class_code)
    config.define(regs.CACHE_LINE_SIZE, 1, writable=0xFF)
    for index, bar in bars.items():
        size_bits = ~(bar.size - 1) & ((1 << 64) - 1 if bar.kind == "mem64" else 0xFFFFFFFF)
        config.define(regs.BASE_ADDRESS_0 + 4 * index, bar.slots * 4, bar.type_bits, writable=size_bits)
    config.define(regs.SUBSYSTEM_VENDOR_ID, 2, ids.subsystem_vendor)
    config.define(regs.SUBSYSTEM_ID, 2, ids.subsystem_device)
    config.define(regs.INTERRUPT_LINE, 1, writable=0xFF)
    config.define(regs.INTERRUPT_PIN, 1, interrupt_pin)
    return config


def _command_bits(bars: Mapping[int, Bar], interrupt_pin: int) -> int:
    """Bits without a function here are hardwired to 0 (6.2.2)."""
    bits = Command.MASTER | Command.PARITY | Command.SERR
    for bar in bars.values():
        bits |= Command.IO if bar.kind == "io" else Command.MEMORY
    return bits | Command.INTX_DISABLE if interrupt_pin else bits
