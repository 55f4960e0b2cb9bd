"""PCI configuration space as enumeration software walks it (PCI Local Bus Specification 3.0, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mdevkit_vfio.ops import VfioOps
from mdevkit_vfio.uapi import Irq, Region

from mdevkit_testkit.suites.vfio.base import VfioBase, config, irq_count, needs, poke

_VENDOR: Final = 0x00
_STATUS: Final = 0x06
_HEADER_TYPE: Final = 0x0E
_BAR0: Final = 0x10
_ROM: Final = 0x30
_CAPABILITIES: Final = 0x34
_PIN: Final = 0x3D
_CAP_LIST: Final = 0x10
_CAP_MSI: Final = 0x05
_CAP_MSIX: Final = 0x11

#: Offset and size of what nobody can write (6.1, 6.2.1, 6.2.4).
_READ_ONLY: Final = {
    "vendor id": (0x00, 2),
    "device id": (0x02, 2),
    "revision": (0x08, 1),
    "class code": (0x09, 3),
    "header type": (0x0E, 1),
    "subsystem vendor id": (0x2C, 2),
    "subsystem id": (0x2E, 2),
    "capability pointer": (0x34, 1),
    "interrupt pin": (0x3D, 1),
}


class ConfigSpace(VfioBase):
    """The header, base address registers and the capability list."""

    def test_header_identifies_the_device(self, ops: VfioOps) -> None:
        """Checks that there is a vendor id, and a header of type 0, the one for devices."""
        assert config(ops, _VENDOR, 2) not in {0x0000, 0xFFFF}, "the vendor id says that there is no device"
        assert config(ops, _HEADER_TYPE, 1) & 0x7F == 0, f"header type {config(ops, _HEADER_TYPE, 1):#x} is not that of a device"

    def test_read_only_fields_stay(self, ops: VfioOps) -> None:
        """Checks that identity, class, header type, capability pointer and interrupt pin ignore writes of every width."""
        before = {name: config(ops, *place) for name, place in _READ_ONLY.items()}
        for width in (1, 2, 4):
            for offset, _ in _READ_ONLY.values():
                for data in (b"\xff" * width, bytes(width)):
                    poke(ops, Region.CONFIG, offset & -width, data)
        for name, place in _READ_ONLY.items():
            assert config(ops, *place) == before[name], f"{name} went from {before[name]:#x} to {config(ops, *place):#x}"

    def test_sizing_gives_powers_of_two(self, ops: VfioOps) -> None:
        """Checks that a BAR answers a write of all ones with its size, that of its region, and takes its value back."""
        index = 0
        while index <= Region.BAR5:
            index += _check_bar(ops, index)

    def test_sizing_of_the_rom(self, ops: VfioOps) -> None:
        """Checks that the ROM's base address register has the size of region ROM, and none means none."""
        size = ops.region_info(Region.ROM).size
        answer = _size(ops, _ROM, 0xFFFFF800)
        assert answer == size, f"the ROM register answers sizing with {answer:#x}, region ROM has {size:#x} bytes"

    def test_interrupt_pin_fits(self, ops: VfioOps) -> None:
        """Checks that the interrupt pin is 0 to 4, and that there is INTx exactly where there is a pin."""
        pin, count = config(ops, _PIN, 1), irq_count(ops, Irq.INTX)
        assert pin <= 4, f"interrupt pin {pin}"
        assert bool(pin) == bool(count), f"interrupt pin {pin}, but {count} interrupts at index INTX"

    def test_capability_list_ends(self, ops: VfioOps) -> None:
        """Checks that the capability list stays behind the header, visits nothing twice and ends."""
        for offset, identifier in _capabilities(ops):
            assert identifier not in {0x00, 0xFF}, f"the capability at {offset:#x} has id {identifier:#x}"

    def test_msi_capabilities_fit_the_interrupts(self, ops: VfioOps) -> None:
        """Checks that the capabilities MSI and MSI-X offer as many vectors as GET_IRQ_INFO says."""
        for offset, identifier in _capabilities(ops):
            control = config(ops, offset + 2, 2)
            if identifier == _CAP_MSI:
                _check_vectors("MSI", 1 << (control >> 1 & 7), irq_count(ops, Irq.MSI))
            if identifier == _CAP_MSIX:
                _check_vectors("MSI-X", (control & 0x7FF) + 1, irq_count(ops, Irq.MSIX))
                for what, register in (("table", offset + 4), ("pending bits", offset + 8)):
                    _check_msix_place(ops, what, config(ops, register, 4), (control & 0x7FF) + 1)

    @needs("mapped")
    def test_mapped_regions_go_without_intx(self, ops: VfioOps) -> None:
        """Checks that a device with a region that can be mapped has no INTx: QEMU unmaps all of them at its first interrupt."""
        assert not irq_count(ops, Irq.INTX), "a region can be mapped, and the device has INTx; use MSI or MSI-X"


def _check_bar(ops: VfioOps, index: int) -> int:
    """Check base address register `index`; return how many registers it takes."""
    register = _BAR0 + 4 * index
    before = config(ops, register, 4)
    wide = before & 0x7 == 0x4
    size = ops.region_info(index).size
    answer = _size(ops, register, 0xFFFFFFFF, wide=wide)
    assert answer == size, f"BAR{index} answers sizing with {answer:#x}, its region has {size:#x} bytes"
    after = config(ops, register, 4)
    assert after == before, f"BAR{index} reads {after:#x} after sizing, {before:#x} before"
    if wide:
        assert index < Region.BAR5, "BAR5 is a 64-bit one, and has no upper half"
        upper = ops.region_info(index + 1).size
        assert not upper, f"BAR{index + 1} is the upper half of a 64-bit one, and has a region of {upper:#x} bytes"
    return 2 if wide else 1


def _size(ops: VfioOps, register: int, ones: int, *, wide: bool = False) -> int:
    """Size a base address register as 6.2.5.1 says; 0 if it does not exist."""
    low, high = config(ops, register, 4), config(ops, register + 4, 4) if wide else 0
    _put(ops, register, ones)
    answer = config(ops, register, 4)
    if wide:
        _put(ops, register + 4, 0xFFFFFFFF)
        answer |= config(ops, register + 4, 4) << 32
        _put(ops, register + 4, high)
    _put(ops, register, low)
    if not answer:
        return 0
    mask = answer & ~(0x3 if answer & 1 and register != _ROM else 0x7FF if register == _ROM else 0xF)
    size = mask & -mask
    # I/O registers of 16 bits have the upper ones hardwired to zero.
    top = 1 << (64 if wide else 32)
    ends = {top, 1 << 16} if answer & 1 and register != _ROM else {top}
    assert mask + size in ends, f"the register at {register:#x} answers sizing with {answer:#x}: its ones are not in one piece"
    return size


def _put(ops: VfioOps, register: int, value: int) -> None:
    ops.write(Region.CONFIG, register, value.to_bytes(4, "little"))


def _capabilities(ops: VfioOps) -> Iterator[tuple[int, int]]:
    """Yield offset and id of each capability."""
    if not config(ops, _STATUS, 2) & _CAP_LIST:
        return
    seen: list[int] = []
    offset = config(ops, _CAPABILITIES, 1)
    while offset:
        assert offset >= 0x40, f"a capability at {offset:#x}, inside the header (list so far: {_hex(seen)})"
        assert offset % 4 == 0, f"a capability at {offset:#x}, not a multiple of 4 (list so far: {_hex(seen)})"
        assert offset not in seen, f"the capability list comes back to {offset:#x}: it never ends ({_hex(seen)})"
        seen.append(offset)
        yield offset, config(ops, offset, 1)
        offset = config(ops, offset + 1, 1)


def _hex(numbers: list[int]) -> str:
    return ", ".join(f"{number:#x}" for number in numbers)


def _check_vectors(what: str, offered: int, count: int) -> None:
    assert offered == count, f"capability {what} offers {offered} vectors, GET_IRQ_INFO says {count}"


def _check_msix_place(ops: VfioOps, what: str, register: int, vectors: int) -> None:
    bar, offset = register & 7, register & ~7
    needed = vectors * 16 if what == "table" else (vectors + 63) // 64 * 8
    assert bar <= Region.BAR5, f"the MSI-X {what} lies in BAR{bar}"
    size = ops.region_info(bar).size
    assert offset + needed <= size, f"the MSI-X {what} ends at {offset + needed:#x} of BAR{bar}, which has {size:#x} bytes"
