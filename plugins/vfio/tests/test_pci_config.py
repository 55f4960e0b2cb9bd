"""Configuration space against the specification: literals typed from it, and a second implementation made of big integers."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit_vfio.ops import SparseArea
from mdevkit_vfio.pci import Bar, Capability, Msix, PciConfig, PciDevice, PciIds
from mdevkit_vfio.uapi import Region

IDS = PciIds(0x1B36, 0x000F, 0x1AF4, 0x1100, class_code=0x038000, revision=3)
BARS = {0: Bar(8, "io"), 1: Bar(0x4000), 2: Bar(1 << 33, "mem64", prefetchable=True), 4: Bar(256, "io"), 5: Bar(16)}

#: (offset, bytes, value after power-on, writable bits) of the function below, from PCI 3.0 figure 6-1, 6.2.5.1, 6.8.1.1.
REGISTERS = [
    (0x00, 2, 0x1B36, 0),
    (0x02, 2, 0x000F, 0),
    (0x04, 2, 0x0000, 0x0547),  # I/O, memory, master, parity, SERR#, interrupt disable
    (0x06, 2, 0x0010, 0),  # capability list
    (0x08, 4, 0x03800003, 0),
    (0x0C, 4, 0x00000000, 0x000000FF),  # cache line size
    (0x10, 4, 0x00000001, 0xFFFFFFF8),
    (0x14, 4, 0x00000000, 0xFFFFC000),
    (0x18, 8, 0x0000000C, 0xFFFFFFFE00000000),
    (0x20, 4, 0x00000001, 0xFFFFFF00),
    (0x24, 4, 0x00000000, 0xFFFFFFF0),
    (0x28, 4, 0, 0),
    (0x2C, 4, 0x11001AF4, 0),
    (0x30, 4, 0, 0),
    (0x34, 4, 0x40, 0),
    (0x38, 4, 0, 0),
    (0x3C, 2, 0x0100, 0x00FF),  # line, pin
    (0x3E, 2, 0, 0),
    (0x40, 4, 0x00074809, 0x00000000),  # vendor: next 0x48, length 7 ...
    (0x44, 3, 0xBBAA99, 0x00F000),
    (0x48, 4, 0x01846005, 0x00710000),  # MSI: 64 bit, masking, 4 vectors
    (0x4C, 4, 0, 0xFFFFFFFC),
    (0x50, 4, 0, 0xFFFFFFFF),
    (0x54, 2, 0, 0xFFFF),
    (0x58, 4, 0, 0x0000000F),  # mask bits
    (0x5C, 4, 0, 0),  # pending bits
    (0x60, 4, 0x00040011, 0xC0000000),  # MSI-X: 5 vectors
    (0x64, 4, 0x00000001, 0),
    (0x68, 4, 0x00002001, 0),
]


class Card(PciDevice):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__(
            IDS,
            BARS,
            interrupt_pin=1,
            capabilities=[Capability(0x09, bytes([0x07, 0x00, 0x99, 0xAA, 0xBB]), bytes([0, 0, 0, 0xF0]))],
            msi_vectors=4,
            msi_masking=True,
            msix=Msix(5, 1, pba_offset=0x2000),
        )


class Oracle:
    """The whole space as one integer and one mask."""

    def __init__(self) -> None:
        self.value = self.writable = 0
        for offset, _, value, writable in REGISTERS:
            self.value |= value << 8 * offset
            self.writable |= writable << 8 * offset

    def write(self, offset: int, data: bytes) -> None:
        window = self.writable & (1 << 8 * len(data)) - 1 << 8 * offset
        self.value = self.value & ~window | int.from_bytes(data, "little") << 8 * offset & window

    def bytes(self) -> bytes:
        return self.value.to_bytes(256, "little")


def put(device: PciDevice, offset: int, value: int, size: int = 4) -> None:
    device.write(Region.CONFIG, offset, value.to_bytes(size, "little"))


def get(device: PciDevice, offset: int, size: int = 4) -> int:
    return int.from_bytes(device.read(Region.CONFIG, offset, size), "little")


def test_power_on_bytes() -> None:
    assert Card().read(Region.CONFIG, 0, 256) == Oracle().bytes()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 260), st.binary(min_size=0, max_size=9) | st.just(b"\xff" * 4)), max_size=20))
def test_any_sequence_of_writes_matches_the_oracle(writes: list[tuple[int, bytes]]) -> None:
    device, oracle = Card(), Oracle()
    for offset, data in writes:
        device.write(Region.CONFIG, offset, data)
        oracle.write(offset, data[: max(0, 256 - offset)])
        assert device.read(Region.CONFIG, 0, 256) == oracle.bytes()


@given(st.integers(0, 300), st.integers(0, 300))
def test_any_read_returns_as_much_as_asked(offset: int, count: int) -> None:
    image = Oracle().bytes() + bytes(600)
    assert Card().read(Region.CONFIG, offset, count) == image[offset : offset + count]


@pytest.mark.parametrize(
    ("offset", "answer"),
    [(0x10, 0xFFFFFFF9), (0x14, 0xFFFFC000), (0x18, 0x0000000C), (0x1C, 0xFFFFFFFE), (0x20, 0xFFFFFF01), (0x24, 0xFFFFFFF0)],
)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_all_ones_ask_for_the_size_in_any_width(offset: int, answer: int, width: int) -> None:
    device = Card()
    for part in range(offset, offset + 4, width):
        put(device, part, (1 << 8 * width) - 1, width)
    assert get(device, offset) == answer


def test_an_address_is_kept_and_reported() -> None:
    device = Card()
    put(device, 0x10, 0x0000C127)
    put(device, 0x18, 0xFFFFFFFF)
    put(device, 0x1C, 0x0000007E)
    assert get(device, 0x10) == 0xC121
    assert device.config.bar_address(0) == 0xC120
    assert device.config.bar_address(2) == 0x7E << 32


def test_base_address_registers_that_do_not_exist_stay_zero() -> None:
    device = PciDevice(IDS, {0: Bar(4096)})
    for offset in range(0x14, 0x28, 4):
        put(device, offset, 0xFFFFFFFF)
        assert get(device, offset) == 0


def test_command_bits_without_a_function_are_hardwired() -> None:
    device = PciDevice(IDS, {0: Bar(4096)})
    put(device, 4, 0xFFFF, 2)
    assert get(device, 4, 2) == 0x0146, "no I/O space, no pin to disable"


def test_status_errors_are_cleared_by_writing_one() -> None:
    device = Card()
    device.config.put(0x06, 2, 0x8810)
    put(device, 0x06, 0x0800, 2)
    assert get(device, 0x06, 2) == 0x8010
    put(device, 0x06, 0x0000, 2)
    assert get(device, 0x06, 2) == 0x8010
    put(device, 0x06, 0xFFFF, 2)
    assert get(device, 0x06, 2) == 0x0010


def test_bus_master_follows_the_command_register() -> None:
    device = Card()
    assert not device.config.bus_master
    put(device, 4, 0x0004, 2)
    assert device.config.bus_master
    assert device.config.command == 0x0004


def test_reset_restores_every_register() -> None:
    device = Card()
    device.write(Region.CONFIG, 0, b"\xff" * 256)
    device.config.put(0, 2, 0)
    device.reset()
    assert device.read(Region.CONFIG, 0, 256) == Oracle().bytes()


def test_extended_configuration_space_has_no_extended_capabilities() -> None:
    device = PciDevice(IDS, {}, config_size=4096)
    assert device.region_info(Region.CONFIG).size == 4096
    assert device.read(Region.CONFIG, 0x100, 4) == bytes(4)
    device.write(Region.CONFIG, 0xFFE, b"\xff" * 8)
    assert device.read(Region.CONFIG, 0xFFE, 2) == bytes(2)


def test_a_vendor_lays_out_registers_of_its_own() -> None:
    config = PciConfig(255)
    config.define(0x40, 4, 0x80000023, writable=0x0000FF00)
    config.write(0x3F, b"\xff" * 6)
    assert config.read(0x40, 4) == bytes([0x23, 0xFF, 0x00, 0x80])
    assert config.read(0xFE, 2) == bytes(2), "the last byte, and one beyond"
    with pytest.raises(ValueError, match="outside the configuration space"):
        config.define(0xFE, 2)
    with pytest.raises(ValueError, match=r"register -0x1 of 1 bytes"):
        config.define(-1, 1)


def test_capabilities_form_a_list_at_the_places_asked_for() -> None:
    device = PciDevice(
        IDS,
        {},
        capabilities=[Capability(0x09, bytes(14)), Capability.vendor(b"abc", b"\xff", offset=0x80), Capability(0x01, bytes(6))],
    )
    assert get(device, 0x34, 1) == 0x40
    assert get(device, 0x40, 2) == 0x8009
    assert device.read(Region.CONFIG, 0x80, 6) == bytes([0x09, 0x50, 0x06]) + b"abc"
    assert get(device, 0x50, 2) == 0x0001, "the first free place, and the end of the list"
    put(device, 0x82, 0xFFFF, 2)
    assert device.read(Region.CONFIG, 0x82, 3) == bytes([0x06, 0xFF]) + b"b", "the length byte is read-only"


def test_without_capabilities_the_status_says_so() -> None:
    device = PciDevice(IDS, {})
    assert (get(device, 0x34, 1), get(device, 0x06, 2)) == (0, 0)


def test_msi_without_a_capability_is_invisible() -> None:
    device = PciDevice(IDS, {}, msi_vectors=1, msi_capability=False)
    assert get(device, 0x34, 1) == 0
    assert device.irq_info(1).count == 1


PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PciIds(0x10000, 0), "vendor 0x10000 does not fit 16 bits"),
        (lambda: PciIds(0, 0, class_code=1 << 24), "class_code 0x1000000 does not fit 24 bits"),
        (lambda: PciIds(0, 0, revision=-1), "revision -0x1 does not fit 8 bits"),
        (lambda: Bar(24), "a power of two from 16"),
        (lambda: Bar(8), "8 bytes for a BAR of kind mem32"),
        (lambda: Bar(512, "io"), "512 bytes for a BAR of kind io: a power of two from 4 to 256"),
        (lambda: Bar(1 << 32), "4294967296 bytes for a BAR of kind mem32"),
        (lambda: Bar(4096, "mmio"), "kind 'mmio' of a BAR"),
        (lambda: Bar(8, "io", widest=8), "accesses of 8 bytes are not possible for a BAR of kind io"),
        (lambda: Bar(16, widest=3), "accesses of 3 bytes"),
        (lambda: Bar(8, "io", mapped=True), "I/O ports can be neither mapped nor prefetchable"),
        (lambda: Bar(8192, areas=[SparseArea(0, PAGE)]), "areas of a BAR that is not mapped"),
        (lambda: Bar(16, mapped=True), "smaller than a page"),
        (lambda: Bar(4 * PAGE, mapped=True, areas=[SparseArea(1, PAGE)]), "not made of whole pages"),
        (lambda: Bar(4 * PAGE, mapped=True, areas=[SparseArea(PAGE, 0)]), "not made of whole pages"),
        (lambda: Bar(4 * PAGE, mapped=True, areas=[SparseArea(3 * PAGE, 2 * PAGE)]), "leaves the BAR"),
        (lambda: Bar(4 * PAGE, mapped=True, areas=[SparseArea(PAGE, PAGE), SparseArea(0, 2 * PAGE)]), "overlaps another"),
        (lambda: PciDevice(IDS, {6: Bar(16)}), "BAR 6: 0 to 5"),
        (lambda: PciDevice(IDS, {0: Bar(16, "mem64"), 1: Bar(16)}), "BAR 1 is the upper half of the 64-bit BAR 0"),
        (lambda: PciDevice(IDS, {5: Bar(16, "mem64")}), "BAR 5 cannot be 64 bits wide"),
        (lambda: PciDevice(IDS, {0: Bar(PAGE, mapped=True)}, interrupt_pin=1), "must use MSI or MSI-X"),
        (lambda: PciDevice(IDS, {}, interrupt_pin=5), "interrupt pin 5"),
        (lambda: PciDevice(IDS, {}, config_size=32), "a configuration space of 32 bytes"),
        (lambda: PciDevice(IDS, {}, msi_vectors=3), "3 MSI vectors"),
        (lambda: PciDevice(IDS, {}, msi_vectors=64, msi_capability=False), "64 MSI vectors"),
        (lambda: Capability(256), "capability id 0x100"),
        (lambda: Capability(1, b"a", b"ab"), "more writable bits than body"),
        (lambda: PciDevice(IDS, {}, capabilities=[Capability(1, offset=0x42)]), "no room for capability 0x1 of 2 bytes at 0x42"),
        (lambda: PciDevice(IDS, {}, capabilities=[Capability(1, offset=0x3C)]), "no room for capability 0x1 of 2 bytes at 0x3c"),
        (lambda: PciDevice(IDS, {}, capabilities=[Capability(9, bytes(190)), Capability(9, b"\0")]), "no room for capability 0x9"),
        (lambda: PciDevice(IDS, {}, capabilities=[Capability(9, bytes(6)), Capability(9, offset=0x44)]), "at 0x44"),
        (lambda: Msix(0, 0), "0 MSI-X vectors"),
        (lambda: Msix(2049, 0), "2049 MSI-X vectors"),
        (lambda: Msix(2, 0, table_offset=4), "multiples of 8"),
        (lambda: Msix(2, 0, pba_offset=24), "overlap"),
        (lambda: PciDevice(IDS, {0: Bar(8, "io")}, msix=Msix(1, 0)), "BAR 0 is none"),
        (lambda: PciDevice(IDS, {0: Bar(16)}, msix=Msix(1, 1)), "BAR 1 is none"),
        (lambda: PciDevice(IDS, {0: Bar(16)}, msix=Msix(1, 0)), "BAR 0 of 16 bytes ends before"),
        (lambda: PciDevice(IDS, {0: Bar(PAGE, mapped=True)}, msix=Msix(1, 0)), "lie in a mapped area"),
    ],
)
def test_what_no_function_can_have_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
