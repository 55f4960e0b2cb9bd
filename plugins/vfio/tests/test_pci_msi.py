"""Messages: what the guest programs in configuration space and in the MSI-X table, and what reaches the client's eventfds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mdevkit_vfio.ops import IrqRequest
from mdevkit_vfio.pci import Bar, Msix, PciDevice, PciIds
from mdevkit_vfio.uapi import Irq, IrqSet, Region

IDS = PciIds(0x1234, 0x5678)
MSI, MSIX = 0x40, 0x58
TABLE, PBA = 0x100, 0x800


class NoMemory:
    """A client that shares no memory and is never asked for any."""

    def dma_read(self, iova: int, count: int) -> bytes:
        raise AssertionError(f"{iova} {count}")

    def dma_write(self, iova: int, data: bytes) -> None:
        raise AssertionError(f"{iova} {data!r}")


class Card(PciDevice):
    """Four MSI vectors with mask bits, ten MSI-X vectors in the middle of BAR 1."""

    def __init__(self) -> None:
        msix = Msix(10, 1, table_offset=TABLE, pba_offset=PBA)
        super().__init__(IDS, {1: Bar(4096)}, msi_vectors=4, msi_masking=True, msix=msix)
        self.registers = bytearray(4096)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        assert bar == 1
        return int.from_bytes(self.registers[offset : offset + size], "little")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        assert bar == 1
        self.registers[offset : offset + size] = value.to_bytes(size, "little")


class Rig:
    """The card, and the client's eventfds by (index, vector)."""

    def __init__(self) -> None:
        self.card = Card()
        self.card.open(NoMemory())
        self.fds: dict[tuple[int, int], int] = {}

    def arm(self, index: int, *vectors: int) -> None:
        for vector in vectors:
            fd = self.fds[index, vector] = os.eventfd(0, os.EFD_NONBLOCK)
            flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
            self.card.set_irqs(IrqRequest(flags, index, vector, 1, fds=[os.dup(fd)]))

    def count(self, index: int, vector: int) -> int:
        try:
            return os.eventfd_read(self.fds[index, vector])
        except BlockingIOError:
            return 0

    def config(self, offset: int, value: int, size: int = 2) -> None:
        self.card.write(Region.CONFIG, offset, value.to_bytes(size, "little"))

    def table(self, vector: int, field: int, value: int) -> None:
        self.card.write(1, TABLE + 16 * vector + field, value.to_bytes(4, "little"))

    def pending(self) -> int:
        return int.from_bytes(self.card.read(1, PBA, 8), "little")

    def close(self) -> None:
        self.card.release()
        for fd in self.fds.values():
            os.close(fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.mark.parametrize(
    ("vectors", "masking", "control", "length"),
    [(1, False, 0x0080, 14), (4, False, 0x0084, 14), (32, False, 0x008A, 14), (1, True, 0x0180, 24), (32, True, 0x018A, 24)],
)
def test_msi_capability(vectors: int, masking: bool, control: int, length: int) -> None:
    device = PciDevice(IDS, {0: Bar(4096)}, msi_vectors=vectors, msi_masking=masking, msix=Msix(1, 0))
    data = device.read(Region.CONFIG, 0x40, length)
    following = 0x40 + (length + 3) // 4 * 4
    assert data == bytes([0x05, following]) + control.to_bytes(2, "little") + bytes(length - 4)
    assert device.read(Region.CONFIG, following, 1) == b"\x11"
    device.write(Region.CONFIG, 0x42, b"\xff" * 0x1E)
    data = device.read(Region.CONFIG, 0x42, length - 2)
    assert data[:2] == (control | 0x71).to_bytes(2, "little"), "enable and number of enabled vectors"
    assert data[2:12] == b"\xfc" + b"\xff" * 9
    if masking:
        assert data[12:] == bytes(2) + ((1 << vectors) - 1).to_bytes(4, "little") + bytes(4)


@pytest.mark.parametrize(
    ("msix", "words"),
    [
        (Msix(1, 0), "000000000000 10000000"),
        (Msix(2048, 4, 0x2000, 0), "ff0704200000 04000000"),
        (Msix(3, 2), "020002000000 32000000"),
    ],
)
def test_msix_capability(msix: Msix, words: str) -> None:
    device = PciDevice(IDS, {index: Bar(1 << 16) for index in range(5)}, msix=msix)
    assert device.read(Region.CONFIG, 0x42, 10) == bytes.fromhex(words)
    device.write(Region.CONFIG, 0x42, b"\xff" * 10)
    changed = device.read(Region.CONFIG, 0x42, 10)
    assert changed[1] == bytes.fromhex(words)[1] | 0xC0
    assert changed[2:] == bytes.fromhex(words)[2:]


def test_the_table_after_power_on_and_after_reset(rig: Rig) -> None:
    power_on = (bytes(12) + b"\1\0\0\0") * 10
    assert rig.card.read(1, TABLE, 160) == power_on
    rig.card.write(1, TABLE, b"\xff" * 160)
    written = rig.card.read(1, TABLE, 160)
    assert written == (b"\xfc" + b"\xff" * 11 + b"\1\0\0\0") * 10, "reserved bits stay zero"
    rig.card.reset()
    assert rig.card.read(1, TABLE, 160) == power_on


def test_accesses_across_the_table_reach_both_sides(rig: Rig) -> None:
    rig.card.write(1, TABLE - 4, b"abcdefgh")
    assert rig.card.registers[TABLE - 4 : TABLE + 4] == b"abcd" + bytes(4)
    assert rig.card.read(1, TABLE - 4, 8) == b"abcd" + bytes([ord("e") & 0xFC]) + b"fgh"
    rig.card.write(1, TABLE + 156, b"\0\0\0\0wxyz")
    assert rig.card.registers[TABLE + 160 : TABLE + 164] == b"wxyz"
    assert rig.card.read(1, 0, 4096)[TABLE + 156 : TABLE + 164] == b"\0\0\0\0wxyz"


def test_a_table_nobody_writes_masks_nothing(rig: Rig) -> None:
    """QEMU and cloud-hypervisor keep the guest's table to themselves and only send SET_IRQS."""
    rig.arm(Irq.MSIX, 0, 9)
    rig.card.trigger_msi(9)
    assert (rig.count(Irq.MSIX, 0), rig.count(Irq.MSIX, 9)) == (0, 1)


def test_a_vector_the_client_masks_in_the_table_is_pending(rig: Rig) -> None:
    rig.arm(Irq.MSIX, 2, 3)
    rig.table(2, 12, 1)
    rig.card.trigger_msi(2)
    rig.card.trigger_msi(2)
    rig.card.trigger_msi(3)
    assert (rig.count(Irq.MSIX, 2), rig.count(Irq.MSIX, 3), rig.pending()) == (0, 1, 1 << 2)
    rig.card.write(1, PBA, bytes(8))
    assert rig.pending() == 1 << 2, "the pending bits are read-only"
    rig.table(2, 12, 0)
    assert (rig.count(Irq.MSIX, 2), rig.pending()) == (1, 0)


def test_programming_an_entry_as_linux_does(rig: Rig) -> None:
    """Function mask on, entries written masked, then everything unmasked."""
    rig.config(MSIX + 2, 0xC000)
    rig.arm(Irq.MSIX, 0, 1)
    for field, value in ((0, 0xFEE00000), (4, 0), (8, 0x4021), (12, 1)):
        rig.table(0, field, value)
    rig.card.trigger_msi(0)
    rig.card.trigger_msi(1)
    rig.config(MSIX + 2, 0x8000)
    assert (rig.count(Irq.MSIX, 0), rig.count(Irq.MSIX, 1)) == (0, 1)
    rig.table(0, 12, 0)
    assert (rig.count(Irq.MSIX, 0), rig.pending()) == (1, 0)


def test_clearing_the_enable_bit_forgets_what_is_pending(rig: Rig) -> None:
    rig.config(MSIX + 2, 0x8000)
    rig.card.trigger_msi(7)
    assert rig.pending() == 1 << 7
    rig.config(MSIX + 2, 0x0000)
    assert rig.pending() == 0
    rig.arm(Irq.MSIX, 7)
    assert rig.count(Irq.MSIX, 7) == 0


def test_reset_unmasks_and_forgets(rig: Rig) -> None:
    rig.arm(Irq.MSIX, 4)
    rig.table(4, 12, 1)
    rig.card.trigger_msi(4)
    rig.card.reset()
    assert rig.pending() == 0
    rig.card.trigger_msi(4)
    assert rig.count(Irq.MSIX, 4) == 1


def test_msi_mask_and_pending_bits(rig: Rig) -> None:
    rig.config(MSI + 2, 0x0001)
    rig.arm(Irq.MSI, 0)
    rig.config(MSI + 0x10, 0b0001, 4)
    rig.card.trigger_msi(0)
    assert rig.count(Irq.MSI, 0) == 0
    assert rig.card.read(Region.CONFIG, MSI + 0x14, 4) == b"\1\0\0\0"
    rig.config(MSI + 0x10, 0, 4)
    assert rig.count(Irq.MSI, 0) == 1
    assert rig.card.read(Region.CONFIG, MSI + 0x14, 4) == bytes(4)


def test_a_device_without_messages_of_any_kind() -> None:
    device = PciDevice(IDS, {})
    with pytest.raises(ValueError, match="vector 0 is not one of the device's 0 vectors"):
        device.trigger_msi(0)


@given(st.lists(st.tuples(st.integers(0, 180), st.binary(max_size=40)), max_size=12))
def test_any_write_to_the_table_keeps_masks_and_table_in_step(writes: list[tuple[int, bytes]]) -> None:
    card = Card()
    mirror = bytearray((bytes(12) + b"\1\0\0\0") * 10)
    touched: set[int] = set()
    for offset, data in writes:
        card.write(1, TABLE + offset, data)
        for position, byte in enumerate(data, offset):
            if position < len(mirror):
                keep = {0: 0xFC, 12: 0x01, 13: 0, 14: 0, 15: 0}.get(position % 16, 0xFF)
                mirror[position] = byte & keep
                touched.add(position // 16)
    assert card.read(1, TABLE, 160) == mirror
    assert card.interrupts.msix.masked == sum(1 << vector for vector in touched if mirror[16 * vector + 12])
