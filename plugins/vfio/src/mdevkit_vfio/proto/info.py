"""What a device is: GET_INFO, GET_REGION_INFO with its capabilities, GET_REGION_IO_FDS, GET_IRQ_INFO."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mdevkit_vfio.ops import DeviceInfo, IrqInfo, Mapping, SparseArea
from mdevkit_vfio.ops import RegionInfo as OpsRegionInfo
from mdevkit_vfio.proto.header import MAX_DATA_XFER_SIZE, Buffer, Command, at_least, check_argsz, invalid
from mdevkit_vfio.uapi import Device, IrqFlag, RegionCap, RegionFlag

_DEVICE_INFO = struct.Struct("=IIII")
_REGION_INFO = struct.Struct("=IIIIQQ")
_CAP_SPARSE = struct.Struct("=HHIII")
_CAP_TYPE = struct.Struct("=HHIII")
_SPARSE_AREA = struct.Struct("=QQ")
_IO_FDS = struct.Struct("=IIII")
_IRQ_INFO = struct.Struct("=IIII")


def pack_device_info_request() -> bytes:
    """Return the payload of GET_INFO."""
    return _DEVICE_INFO.pack(_DEVICE_INFO.size, 0, 0, 0)


def parse_device_info_request(payload: Buffer) -> None:
    """Check the payload of GET_INFO; argsz may be larger than needed (cloud-hypervisor counts the header in)."""
    at_least(Command.DEVICE_GET_INFO, payload, _DEVICE_INFO.size)
    check_argsz(Command.DEVICE_GET_INFO, _DEVICE_INFO.unpack_from(payload)[0], _DEVICE_INFO.size)


def pack_device_info(info: DeviceInfo) -> bytes:
    """Return the reply to GET_INFO."""
    return _DEVICE_INFO.pack(_DEVICE_INFO.size, info.flags, info.num_regions, info.num_irqs)


def parse_device_info(payload: Buffer) -> DeviceInfo:
    """Read the reply to GET_INFO."""
    at_least(Command.DEVICE_GET_INFO, payload, _DEVICE_INFO.size)
    _, flags, regions, irqs = _DEVICE_INFO.unpack_from(payload)
    return DeviceInfo(Device(flags), regions, irqs)


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """GET_REGION_INFO, GET_IRQ_INFO or GET_REGION_IO_FDS: which index, and how long a reply may be."""

    argsz: int
    index: int


def pack_region_info_request(index: int, argsz: int = _REGION_INFO.size) -> bytes:
    """Return the payload of GET_REGION_INFO."""
    return _REGION_INFO.pack(argsz, 0, index, 0, 0, 0)


def parse_region_info_request(payload: Buffer) -> IndexRequest:
    """Read the payload of GET_REGION_INFO; the peer may send room for capabilities after it."""
    at_least(Command.DEVICE_GET_REGION_INFO, payload, _REGION_INFO.size)
    argsz, _, index, _, _, _ = _REGION_INFO.unpack_from(payload)
    check_argsz(Command.DEVICE_GET_REGION_INFO, argsz, _REGION_INFO.size)
    return IndexRequest(argsz, index)


def pack_region_info(index: int, info: OpsRegionInfo, argsz: int) -> bytes:
    """Return the reply to GET_REGION_INFO for a client that has room for `argsz` bytes.

    Capabilities that do not fit are left out whole: argsz says what is needed, the CAPS flag is clear and cap_offset 0
    (QEMU refuses a region whose CAPS flag is set with no capability in the message).
    """
    caps = _region_caps(info)
    needed = _REGION_INFO.size + len(caps)
    flags = info.flags & ~(RegionFlag.CAPS | RegionFlag.MMAP)
    if info.mapping is not None:
        flags |= RegionFlag.MMAP
    cap_offset = 0
    if caps and argsz >= needed:
        flags |= RegionFlag.CAPS
        cap_offset = _REGION_INFO.size
    offset = info.mapping.offset if info.mapping is not None else 0
    fixed = _REGION_INFO.pack(needed, flags, index, cap_offset, info.size, offset)
    return fixed + caps if cap_offset else fixed


def _region_caps(info: OpsRegionInfo) -> bytes:
    """Return the chain of capabilities; `next` counts from the start of the region info."""
    sparse, kind = b"", b""
    at = _REGION_INFO.size
    if info.mapping is not None and info.mapping.areas:
        areas = info.mapping.areas
        size = _CAP_SPARSE.size + len(areas) * _SPARSE_AREA.size
        follows = at + size if info.type is not None else 0
        sparse = _CAP_SPARSE.pack(RegionCap.SPARSE_MMAP, 1, follows, len(areas), 0)
        sparse += b"".join(_SPARSE_AREA.pack(area.offset, area.size) for area in areas)
    if info.type is not None:
        kind = _CAP_TYPE.pack(RegionCap.TYPE, 1, 0, *info.type)
    return sparse + kind


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """The reply to GET_REGION_INFO as a client sees it; `needed` is the argsz that brings the capabilities too."""

    index: int
    flags: RegionFlag
    size: int
    offset: int
    needed: int
    areas: tuple[SparseArea, ...] = ()
    type: tuple[int, int] | None = None

    def mapping(self, fd: int) -> Mapping:
        """Return what may be mapped, with the descriptor that came along."""
        return Mapping(fd, self.offset, self.areas)


def parse_region_info(payload: Buffer) -> RegionInfo:
    """Read the reply to GET_REGION_INFO; a capability chain that leaves the message or loops is EINVAL."""
    at_least(Command.DEVICE_GET_REGION_INFO, payload, _REGION_INFO.size)
    needed, flags, index, cap_offset, size, offset = _REGION_INFO.unpack_from(payload)
    areas: tuple[SparseArea, ...] = ()
    kind: tuple[int, int] | None = None
    at = cap_offset if flags & RegionFlag.CAPS else 0
    last = 0
    while at:
        if at <= last or at < _REGION_INFO.size or at + _CAP_SPARSE.size > len(payload):
            raise invalid(Command.DEVICE_GET_REGION_INFO, f"a capability at {at} is not in the reply")
        last = at
        cap, _, at, first, second = _CAP_SPARSE.unpack_from(payload, at)
        if cap == RegionCap.SPARSE_MMAP:
            areas = _parse_areas(payload, last + _CAP_SPARSE.size, first)
        elif cap == RegionCap.TYPE:
            kind = (first, second)
    return RegionInfo(index, RegionFlag(flags), size, offset, needed, areas, kind)


def _parse_areas(payload: Buffer, at: int, count: int) -> tuple[SparseArea, ...]:
    if at + count * _SPARSE_AREA.size > len(payload):
        raise invalid(Command.DEVICE_GET_REGION_INFO, f"{count} areas are not in the reply")
    return tuple(SparseArea(*_SPARSE_AREA.unpack_from(payload, at + i * _SPARSE_AREA.size)) for i in range(count))


def pack_io_fds_request(index: int, argsz: int = _IO_FDS.size) -> bytes:
    """Return the payload of GET_REGION_IO_FDS."""
    return _IO_FDS.pack(argsz, 0, index, 0)


def parse_io_fds_request(payload: Buffer) -> IndexRequest:
    """Read the payload of GET_REGION_IO_FDS."""
    at_least(Command.DEVICE_GET_REGION_IO_FDS, payload, _IO_FDS.size)
    argsz, flags, index, count = _IO_FDS.unpack_from(payload)
    check_argsz(Command.DEVICE_GET_REGION_IO_FDS, argsz, _IO_FDS.size, MAX_DATA_XFER_SIZE)
    if flags or count:
        raise invalid(Command.DEVICE_GET_REGION_IO_FDS, f"flags {flags:#x} and count {count} must be zero")
    return IndexRequest(argsz, index)


def pack_no_io_fds(index: int) -> bytes:
    """Return the reply to GET_REGION_IO_FDS of a region without such descriptors."""
    return _IO_FDS.pack(_IO_FDS.size, 0, index, 0)


def parse_io_fds(payload: Buffer) -> int:
    """Read the reply to GET_REGION_IO_FDS: the number of sub-regions."""
    at_least(Command.DEVICE_GET_REGION_IO_FDS, payload, _IO_FDS.size)
    count: int = _IO_FDS.unpack_from(payload)[3]
    return count


def pack_irq_info_request(index: int) -> bytes:
    """Return the payload of GET_IRQ_INFO."""
    return _IRQ_INFO.pack(_IRQ_INFO.size, 0, index, 0)


def parse_irq_info_request(payload: Buffer) -> IndexRequest:
    """Read the payload of GET_IRQ_INFO."""
    at_least(Command.DEVICE_GET_IRQ_INFO, payload, _IRQ_INFO.size)
    argsz, _, index, _ = _IRQ_INFO.unpack_from(payload)
    check_argsz(Command.DEVICE_GET_IRQ_INFO, argsz, _IRQ_INFO.size)
    return IndexRequest(argsz, index)


def pack_irq_info(index: int, info: IrqInfo) -> bytes:
    """Return the reply to GET_IRQ_INFO."""
    return _IRQ_INFO.pack(_IRQ_INFO.size, info.flags, index, info.count)


def parse_irq_info(payload: Buffer) -> IrqInfo:
    """Read the reply to GET_IRQ_INFO."""
    at_least(Command.DEVICE_GET_IRQ_INFO, payload, _IRQ_INFO.size)
    _, flags, _, count = _IRQ_INFO.unpack_from(payload)
    return IrqInfo(IrqFlag(flags), count)
