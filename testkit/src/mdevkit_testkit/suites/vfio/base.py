"""What the parts of the VFIO suite share: devices opened as the driver opens them, a guest's memory, and ways to look at a device.

Ops are called from pytest's thread, which stands for that of the client's connection.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, ClassVar, Final, NamedTuple

import pytest
from mdevkit import Mdev, MdevError, MdevType, Registry
from mdevkit_vfio.bus import VfioBus, VfioMdev
from mdevkit_vfio.ops import DmaRegion, RegionInfo, VfioOps
from mdevkit_vfio.uapi import PCI_NUM_REGIONS, Irq, MigrationFlag, Region, RegionFlag
from mdevkit_vfio.uapi import Device as DeviceFlag

from mdevkit_testkit.suites.base import Suite, check_error, tolerated

WIDTHS: Final = (1, 2, 4, 8)

#: How much of a region's beginning and end is looked at, in bytes.
_BEGINNING: Final = 4096
_END: Final = 64

#: How long a signal may take to come, in seconds.
PATIENCE = 2.0

#: Guest memory that scribbled DMA addresses may hit.
_GUEST_SIZE: Final = 1 << 20

#: What a device may be able to do, in words.
_CAPABILITIES: Final = {
    "reset": "RESET",
    "intx": "INTx",
    "msi": "MSI",
    "msix": "MSI-X",
    "mapped": "region that can be mapped",
    "migration": "migration",
    "precopy": "pre-copy migration",
}

#: Reads a region: index, offset, count.
Reader = Callable[[int, int, int], bytes]


class GuestMemory:
    """A guest's memory and a `DmaTransport` to it: what a device finds when it is opened by the suite."""

    def __init__(self, size: int = _GUEST_SIZE) -> None:
        self.size: Final = size
        self.fd: Final = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)

    def dma_read(self, iova: int, count: int) -> bytes:
        """See `DmaTransport.dma_read`: nothing is shared by message."""
        raise MdevError(errno.EFAULT, f"the client has no memory at {iova:#x} ({count} bytes)")

    def dma_write(self, iova: int, data: bytes) -> None:
        """See `DmaTransport.dma_write`."""
        raise MdevError(errno.EFAULT, f"the client has no memory at {iova:#x} ({len(data)} bytes)")

    def region(self, iova: int = 0, size: int | None = None) -> DmaRegion:
        """Return a region over the memory, with a descriptor of its own for the device to own."""
        return DmaRegion(iova, size or self.size, readable=True, writable=True, fd=os.dup(self.fd))

    def close(self) -> None:
        """Let go of the memory."""
        os.close(self.fd)


@dataclass(frozen=True)
class Reading:
    """What a read gave: data, or the errno of a refusal."""

    data: bytes = b""
    errno: int = 0

    def __str__(self) -> str:
        return errno.errorcode.get(self.errno, str(self.errno)) if self.errno else f"0x{self.data[::-1].hex()}"


class Place(NamedTuple):
    """Where to read: `width` bytes at `offset` of a region."""

    region: int
    offset: int
    width: int


#: What was read where.
Fingerprint = dict[Place, Reading]


class VfioBase(Suite):
    """Fixtures for the parts of the suite."""

    #: What the devices can do, exactly: "reset", "intx", "msi", "msix", "mapped", "migration", "precopy". Tests of other things are
    #: left out then. Not stated, what a device says of itself decides what is skipped.
    expected: ClassVar[Collection[str] | None] = None

    @classmethod
    def wanted(cls, type_: MdevType) -> str:
        """See `Suite.wanted`."""
        return "" if type_.bus == VfioBus.name else f"devices of {type_} are on bus {type_.bus}, not of the VFIO class"

    @pytest.fixture(autouse=True)
    def skip_what_devices_lack(self, request: pytest.FixtureRequest) -> None:
        """Skip a test of something the type's devices do not have."""
        for mark in request.node.iter_markers("mdevkit_needs"):
            (capability,) = mark.args
            if capability not in self.capabilities(request.getfixturevalue("type_id")):
                pytest.skip(f"the device says it has no {_CAPABILITIES[capability]}")

    @pytest.fixture
    def ops(self, registry: Registry, mdev_type: MdevType) -> Iterator[VfioOps]:
        """Return a device's ops, opened, with a guest's memory behind it."""
        with self.opened(self.create(mdev_type, registry)) as ops:
            yield ops

    @pytest.fixture
    def make_ops(self, registry: Registry, mdev_type: MdevType) -> Iterator[Callable[[], VfioOps]]:
        """Return a function that makes another device and returns its ops, opened; it skips the test when there is no room."""
        opened: list[Any] = []

        def make() -> VfioOps:
            context = self.opened(self.another(mdev_type, registry))
            ops = context.__enter__()
            opened.append(context)
            return ops

        yield make
        for context in reversed(opened):
            context.__exit__(None, None, None)

    def another(self, type_: MdevType, registry: Registry, *, bind: bool = False) -> Mdev:
        """Create one more device, at another parent if this one has no room; skips the test when none has."""
        roomy = (other for other in (type_, *registry.types) if other.id == type_.id and other.available_instances)
        found = next(roomy, None)
        if found is None:
            pytest.skip(f"{type_} has no room for a second device")
        return self.create(found, registry, bind=bind)

    @classmethod
    def capabilities(cls, type_id: str) -> frozenset[str]:
        """Return what devices of a type say that they can do, in the words of `expected`."""
        return _capabilities(cls.look_at, type_id)

    @classmethod
    def look_at(cls, type_id: str) -> frozenset[str]:
        """Make a device, and ask it."""
        with cls.make_registry() as registry, cls.opened(cls().create(registry.type(type_id), registry)) as ops:
            return capabilities_of(ops)

    def fresh(self, type_: MdevType, registry: Registry) -> Fingerprint:
        """Return what a new device reads."""
        mdev = self.create(type_, registry)
        with self.opened(mdev) as ops:
            found = fingerprint(ops.read, places(ops))
        registry.remove(mdev.uuid)
        return found

    @staticmethod
    @contextmanager
    def opened(mdev: Mdev) -> Iterator[VfioOps]:
        """Open a device as the driver does for a client, and release it."""
        ops, guest = VfioMdev.from_device(mdev).get_ops(), GuestMemory()
        try:
            ops.open(guest)
            try:
                map_or_close(ops, guest.region())
                yield ops
            finally:
                ops.release()
        finally:
            guest.close()


def needs(capability: str) -> pytest.MarkDecorator:
    """Mark a test as one of something that not every device has; `capability` as in `VfioBase.expected`."""
    return pytest.mark.mdevkit_needs(capability)


@cache
def _capabilities(look: Callable[[str], frozenset[str]], type_id: str) -> frozenset[str]:
    """Remember what `VfioBase.look_at` has found."""
    return look(type_id)


# -- what a device has -----------------------------------------------------------------------------------------------------


def capabilities_of(ops: VfioOps) -> frozenset[str]:
    """Return what a device says of itself, in the words of `VfioBase.expected`."""
    found = {name for name, index in (("intx", Irq.INTX), ("msi", Irq.MSI), ("msix", Irq.MSIX)) if irq_count(ops, index)}
    if ops.info().flags & DeviceFlag.RESET:
        found.add("reset")
    if any(info.flags & RegionFlag.MMAP for info in regions(ops).values()):
        found.add("mapped")
    if ops.migration is not None:
        found.add("migration")
        if ops.migration.flags & MigrationFlag.PRE_COPY:
            found.add("precopy")
    return frozenset(found)


def irq_count(ops: VfioOps, index: int) -> int:
    """Return how many interrupts an index has; 0 for one the device refuses to know."""
    try:
        return ops.irq_info(index).count
    except OSError as error:
        check_error(error, f"GET_IRQ_INFO of index {index}")
        return 0


def regions(ops: VfioOps) -> dict[int, RegionInfo]:
    """Return the regions that exist, by index."""
    infos = {index: ops.region_info(index) for index in range(ops.info().num_regions)}
    return {index: info for index, info in infos.items() if info.size}


def registers(ops: VfioOps) -> dict[int, RegionInfo]:
    """Return the regions behind base address registers."""
    return {index: info for index, info in regions(ops).items() if index <= Region.BAR5}


def is_io(ops: VfioOps, index: int) -> bool:
    """Tell whether a region is behind an I/O base address register."""
    return index <= Region.BAR5 and bool(config(ops, 0x10 + 4 * index, 4) & 1)


def config(ops: VfioOps, offset: int, size: int) -> int:
    """Read a register of configuration space."""
    return int.from_bytes(ops.read(Region.CONFIG, offset, size), "little")


def region_name(index: int) -> str:
    """Name a region for a message."""
    return Region(index).name if index < PCI_NUM_REGIONS else f"region {index}"


def map_or_close(ops: VfioOps, region: DmaRegion) -> None:
    """DMA_MAP; the descriptor stays the caller's when it is refused, and is closed."""
    try:
        ops.dma_map(region)
    except BaseException:
        os.close(region.fd)
        raise


# -- looking at all of it --------------------------------------------------------------------------------------------------


def offsets(size: int, step: int = 1) -> Iterator[int]:
    """Yield the offsets of a region worth looking at: its beginning, powers of two and their neighbours, its end."""
    beginning = min(size, _BEGINNING)
    yield from range(0, beginning, step)
    bit = _BEGINNING
    while bit < size:
        yield from (offset for offset in (bit - step, bit, bit + step) if beginning <= offset < size - _END)
        bit <<= 1
    yield from range(max(beginning, size - _END), size, step)


def places(ops: VfioOps, indexes: Iterable[int] | None = None) -> list[Place]:
    """Return what to read of a device's regions to know its state: bytes of I/O ports, dwords of everything else."""
    found = []
    chosen = regions(ops)
    for index in sorted(chosen) if indexes is None else indexes:
        info = chosen[index]
        if info.flags & RegionFlag.READ:
            width = 1 if is_io(ops, index) or info.size % 4 else 4
            found += [Place(index, offset, width) for offset in offsets(info.size, width)]
    return found


def fingerprint(read: Reader, where: Iterable[Place]) -> Fingerprint:
    """Read everything in `where`, in that order: reading may change a device."""
    return {place: look(read, *place) for place in where}


def look(read: Reader, index: int, offset: int, width: int) -> Reading:
    """Read once; a refusal must be an OSError."""
    doing = f"a read of {width} bytes of {region_name(index)} at {offset:#x}"
    with tolerated(doing) as refusals:
        data = read(index, offset, width)
    if refusals:
        return Reading(errno=refusals[0].errno or errno.EIO)
    assert isinstance(data, bytes), f"{doing} returned {type(data).__name__}, not bytes"
    assert len(data) == width, f"{doing} returned {len(data)} bytes"
    return Reading(data)


def differences(wanted: Fingerprint, found: Fingerprint, ignored: Collection[Place] = ()) -> str:
    """Say where two fingerprints differ, "" if they do not."""
    rows = [
        f"{region_name(place.region)} at {place.offset:#x} reads {found[place]}, not {value}"
        for place, value in wanted.items()
        if found[place] != value and place not in ignored
    ]
    more = f", and {len(rows) - 4} more differences" if len(rows) > 4 else ""
    return "; ".join(rows[:4]) + more


def volatile(one: Fingerprint, other: Fingerprint) -> set[Place]:
    """Return where two fingerprints differ that should not: serial numbers, clocks."""
    return {place for place in one if one[place] != other[place]}


def in_memory(ops: VfioOps, where: Iterable[Place]) -> set[Place]:
    """Return the places that are memory a client can map: like a card's own memory, it outlives a reset."""
    infos = regions(ops)
    return {place for place in where if any(start <= place.offset < end for start, end in _memory(infos[place.region]))}


def _memory(info: RegionInfo) -> list[tuple[int, int]]:
    if info.mapping is None:
        return []
    return [(area.offset, area.offset + area.size) for area in info.mapping.areas] or [(0, info.size)]


def scribble(ops: VfioOps, seed: int, indexes: Iterable[int] | None = None) -> None:
    """Write random values of every width all over a device's regions; a refusal must be an OSError."""
    random = Random(seed)  # noqa: S311  (repeatable, not secret)
    chosen = regions(ops)
    for index in sorted(chosen) if indexes is None else indexes:
        info = chosen[index]
        if info.flags & RegionFlag.WRITE:
            for offset in offsets(info.size):
                width = random.choice([width for width in WIDTHS if offset + width <= info.size])
                value = random.choice([random.randbytes(width), bytes(width), b"\xff" * width])
                poke(ops, index, offset, value)


def poke(ops: VfioOps, index: int, offset: int, data: bytes) -> None:
    """Write once; a refusal must be an OSError."""
    with tolerated(f"a write of {data.hex()} to {region_name(index)} at {offset:#x}"):
        ops.write(index, offset, data)
