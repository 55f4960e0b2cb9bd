"""MSI and MSI-X: the capabilities, and the MSI-X table and pending bits in a BAR (PCI 3.0, 6.8).

VFIO's clients program the messages through SET_IRQS, and most of them (QEMU, cloud-hypervisor) keep the guest's MSI-X
table to themselves. So an eventfd is what enables a vector here, and a mask bit counts only once the client has written
that vector's entry: a table nobody writes must not leave every vector masked, as it is after power-on. Used under the
device's lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mdevkit_vfio.irq import MSI_MAX, MSIX_MAX, Vectors
from mdevkit_vfio.pci import regs
from mdevkit_vfio.pci.config import Capability, PciConfig

ENTRY_SIZE: Final = 16
_VECTOR_CONTROL: Final = 12
_MSI_ENABLE: Final = 0x0001
_MSI_64BIT: Final = 0x0080
_MSI_MASKING: Final = 0x0100
_MSI_MULTIPLE_ENABLE: Final = 0x0070
_MSIX_ENABLE: Final = 0x8000
_MSIX_FUNCTION_MASK: Final = 0x4000


@dataclass(frozen=True)
class Msix:
    """MSI-X with `vectors` vectors (1 to 2048), its table at `table_offset` of memory BAR `bar`.

    The pending-bit array is at `pba_offset`, by default right behind the table. Offsets are multiples of 8. The rest of
    the BAR is the vendor's, but a BAR of its own keeps the vendor's registers on the fast path.
    """

    vectors: int
    bar: int
    table_offset: int = 0
    pba_offset: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.vectors <= MSIX_MAX:
            raise ValueError(f"{self.vectors} MSI-X vectors: 1 to {MSIX_MAX} are possible")
        if self.table_offset % 8 or self.pba_start % 8 or self.table_offset < 0 or self.pba_start < 0:
            raise ValueError("the MSI-X table and pending bits must lie at multiples of 8")
        if self.table_offset < self.pba_start + self.pba_size and self.pba_start < self.table_offset + self.table_size:
            raise ValueError("the MSI-X table and pending bits overlap")

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return self.vectors * ENTRY_SIZE

    @property
    def pba_start(self) -> int:
        """Offset of the pending bits."""
        return self.table_offset + self.table_size if self.pba_offset is None else self.pba_offset

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits: one bit for each vector, in whole quadwords."""
        return (self.vectors + 63) // 64 * 8

    def capability(self) -> Capability:
        """Make the capability (6.8.2.3 to 6.8.2.5): enable and function mask are writable."""
        words = (
            (self.vectors - 1).to_bytes(2, "little")
            + (self.table_offset | self.bar).to_bytes(4, "little")
            + (self.pba_start | self.bar).to_bytes(4, "little")
        )
        return Capability(regs.CAP_MSIX, words, (_MSIX_ENABLE | _MSIX_FUNCTION_MASK).to_bytes(2, "little"))


def make_msi_capability(vectors: int, masking: bool) -> Capability:
    """Make the 64-bit MSI capability (6.8.1) for 1, 2, 4 ... 32 `vectors`, with mask and pending bits if `masking`."""
    if vectors not in (1, 2, 4, 8, 16, MSI_MAX):
        raise ValueError(f"{vectors} MSI vectors: 1, 2, 4, 8, 16 or {MSI_MAX} are possible")
    control = _MSI_64BIT | (vectors.bit_length() - 1) << 1 | (_MSI_MASKING if masking else 0)
    body = control.to_bytes(2, "little") + bytes(4 + 4 + 2)
    writable = (_MSI_ENABLE | _MSI_MULTIPLE_ENABLE).to_bytes(2, "little") + b"\xfc" + b"\xff" * (3 + 4 + 2)
    if masking:
        body += bytes(2 + 4 + 4)
        writable += bytes(2) + ((1 << vectors) - 1).to_bytes(4, "little")
    return Capability(regs.CAP_MSI, body, writable)


class MsiControl:
    """Keeps `vectors` in step with the MSI capability at `offset` of `config`."""

    def __init__(self, config: PciConfig, offset: int, vectors: Vectors, masking: bool) -> None:
        self._config = config
        self._control = offset + 2
        self._mask = offset + 0x10 if masking else 0
        self._pending = offset + 0x14
        self._vectors = vectors

    def written(self) -> None:
        """Follow a write to configuration space."""
        control = self._config.get(self._control, 2)
        self._vectors.set_control(bool(control & _MSI_ENABLE), function_masked=False)
        if self._mask:
            self._vectors.set_masked(self._config.get(self._mask, 4))

    def show_pending(self) -> None:
        """Bring the pending bits up to date before the guest reads them."""
        if self._mask:
            self._config.put(self._pending, 4, self._vectors.pending)


class MsixControl:
    """Keeps `vectors` in step with the MSI-X capability at `offset` of `config`."""

    def __init__(self, config: PciConfig, offset: int, vectors: Vectors) -> None:
        self._config = config
        self._control = offset + 2
        self._vectors = vectors

    def written(self) -> None:
        """Follow a write to configuration space."""
        control = self._config.get(self._control, 2)
        self._vectors.set_control(bool(control & _MSIX_ENABLE), bool(control & _MSIX_FUNCTION_MASK))


class MsixTable:
    """The table: addresses and data the kit stores and nobody needs, and the vectors' mask bits."""

    def __init__(self, layout: Msix, vectors: Vectors) -> None:
        self.start: Final = layout.table_offset
        self.end: Final = layout.table_offset + layout.table_size
        self._entries = bytearray(layout.table_size)
        self._vectors = vectors
        self.reset()

    def reset(self) -> None:
        """Every vector masked, as after power-on; see the module for what that means until an entry is written."""
        entry = bytes(_VECTOR_CONTROL) + b"\1\0\0\0"
        self._entries[:] = entry * (len(self._entries) // ENTRY_SIZE)

    def save(self) -> bytes:
        """Return the entries."""
        return bytes(self._entries)

    def load(self, state: bytes) -> None:
        """Take over entries; the vectors' mask bits are theirs to load."""
        self._entries[:] = state

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset` of the BAR."""
        return bytes(self._entries[offset - self.start : offset - self.start + count])

    def write(self, offset: int, data: bytes) -> None:
        """Store `data`; reserved bits stay 0, and the mask bits of the touched entries take effect."""
        first = offset - self.start
        for position, byte in enumerate(data, first):
            self._entries[position] = byte & _table_mask(position % ENTRY_SIZE)
        masked = self._vectors.masked
        for vector in range(first // ENTRY_SIZE, (first + len(data) - 1) // ENTRY_SIZE + 1):
            bit = 1 << vector
            masked = masked | bit if self._entries[vector * ENTRY_SIZE + _VECTOR_CONTROL] else masked & ~bit
        self._vectors.set_masked(masked)


def _table_mask(position: int) -> int:
    """Writable bits of byte `position` of an entry: not the low address bits, and of the control only the mask bit."""
    if position == 0:
        return 0xFC
    if position < _VECTOR_CONTROL:
        return 0xFF
    return 0x01 if position == _VECTOR_CONTROL else 0


class MsixPending:
    """The pending-bit array; read-only."""

    def __init__(self, layout: Msix, vectors: Vectors) -> None:
        self.start: Final = layout.pba_start
        self.end: Final = layout.pba_start + layout.pba_size
        self._vectors = vectors

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset` of the BAR."""
        bits = self._vectors.pending.to_bytes(self.end - self.start, "little")
        return bits[offset - self.start : offset - self.start + count]

    def write(self, offset: int, data: bytes) -> None:
        """Ignored."""
