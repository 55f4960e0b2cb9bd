"""Guest memory: which ranges the device may reach (DMA_MAP, DMA_UNMAP), and reaching them by message."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from mdevkit_vfio.proto.header import MAX_DATA_XFER_SIZE, PAGE_SIZE, U64_MAX, Buffer, Command, at_least, check_argsz, fixed, invalid

_DMA_MAP = struct.Struct("=IIQQQ")
_DMA_UNMAP = struct.Struct("=IIQQ")
_DMA_ACCESS = struct.Struct("=QQ")
#: The largest off_t.
_OFF_MAX = (1 << 63) - 1

#: Flags of DMA_MAP, from the device's point of view, and how it is to reach the memory.
DMA_READABLE: Final = 1
DMA_WRITEABLE: Final = 2
DMA_BY_MMAP: Final = 4
DMA_BY_FILE_IO: Final = 8
_DMA_MAP_FLAGS = DMA_READABLE | DMA_WRITEABLE | DMA_BY_MMAP | DMA_BY_FILE_IO

#: Flags of DMA_UNMAP; the dirty bitmap belongs to migration v1 and is refused.
UNMAP_ALL: Final = 2


def _check_range(command: Command, iova: int, size: int) -> None:
    if size == 0 or (iova | size) % PAGE_SIZE:
        raise invalid(command, f"the range {iova:#x}+{size:#x} is empty or not made of whole pages")
    if iova + size - 1 > U64_MAX:
        raise invalid(command, f"the range {iova:#x}+{size:#x} wraps around")


class DmaMap(NamedTuple):
    """DMA_MAP: guest memory [iova, iova + size) bytes; `offset` in bytes of the file that came along."""

    flags: int
    offset: int
    iova: int
    size: int

    def pack(self) -> bytes:
        """Return the payload."""
        return _DMA_MAP.pack(_DMA_MAP.size, self.flags, self.offset, self.iova, self.size)

    @classmethod
    def parse(cls, payload: Buffer, fds: int) -> DmaMap:
        """Read the payload that came with `fds` descriptors: at most one, and one where the flags need a file."""
        fixed(Command.DMA_MAP, payload, _DMA_MAP.size)
        argsz, *rest = _DMA_MAP.unpack(payload)
        check_argsz(Command.DMA_MAP, argsz, _DMA_MAP.size)
        request = cls(*rest)
        _check_range(Command.DMA_MAP, request.iova, request.size)
        request._check_flags(fds)
        return request

    def _check_flags(self, fds: int) -> None:
        access = self.flags & (DMA_BY_MMAP | DMA_BY_FILE_IO)
        if self.flags & ~_DMA_MAP_FLAGS or access == DMA_BY_MMAP | DMA_BY_FILE_IO:
            raise invalid(Command.DMA_MAP, f"flags {self.flags:#x} are unknown or contradict each other")
        if not self.flags & (DMA_READABLE | DMA_WRITEABLE):
            raise invalid(Command.DMA_MAP, "the memory is neither readable nor writeable")
        if fds > 1 or (access and not fds):
            raise invalid(Command.DMA_MAP, f"{fds} descriptors do not fit flags {self.flags:#x}")
        if self.offset + self.size > _OFF_MAX:
            raise invalid(Command.DMA_MAP, f"offset {self.offset:#x} is beyond the end of any file")


class DmaUnmap(NamedTuple):
    """DMA_UNMAP: exactly the range of an earlier map, or all of them."""

    flags: int
    iova: int
    size: int

    def pack(self) -> bytes:
        """Return the payload, of the request and of the reply."""
        return _DMA_UNMAP.pack(_DMA_UNMAP.size, self.flags, self.iova, self.size)

    @property
    def all(self) -> bool:
        """Whether every range is meant."""
        return bool(self.flags & UNMAP_ALL)

    @classmethod
    def parse(cls, payload: Buffer) -> DmaUnmap:
        """Read the payload."""
        at_least(Command.DMA_UNMAP, payload, _DMA_UNMAP.size)
        argsz, *rest = _DMA_UNMAP.unpack_from(payload)
        check_argsz(Command.DMA_UNMAP, argsz, _DMA_UNMAP.size, MAX_DATA_XFER_SIZE)
        request = cls(*rest)
        if request.flags & ~UNMAP_ALL:
            raise invalid(Command.DMA_UNMAP, f"flags {request.flags:#x} are unknown")
        if request.all and (request.iova or request.size):
            raise invalid(Command.DMA_UNMAP, "unmapping all takes no range")
        if not request.all:
            _check_range(Command.DMA_UNMAP, request.iova, request.size)
        return request


@dataclass(frozen=True, slots=True)
class DmaAccess:
    """The head of DMA_READ and DMA_WRITE: `count` bytes at `iova`; data follows from byte 16."""

    iova: int
    count: int

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return _DMA_ACCESS.pack(self.iova, self.count)


def parse_dma_access(command: Command, payload: Buffer, with_data: bool) -> tuple[DmaAccess, bytes]:
    """Read a DMA message of either direction.

    `with_data` for a DMA_WRITE request and a DMA_READ reply, which carry exactly `count` bytes; the other two carry none.
    """
    at_least(command, payload, _DMA_ACCESS.size)
    access = DmaAccess(*_DMA_ACCESS.unpack_from(payload))
    fixed(command, payload, _DMA_ACCESS.size + (access.count if with_data else 0))
    return access, bytes(payload[_DMA_ACCESS.size :])
