"""Guest memory as a device reaches it: the table of DMA maps of one client.

Access goes through the map's descriptor with pread(2) and pwrite(2), never through loads and stores in a mapping: the file is
the client's, who may truncate it at any time, and then a load would be SIGBUS where pread merely comes back short. Ranges
without a descriptor are reached by messages to the client.

The open file description that came is the client's too, who may set O_APPEND on it at any time, and then each pwrite would make
the file grow. So a map gets a description of its own; where the client's file cannot be opened again, writes take the way of
hugetlbfs, which has no pwrite: the kernel copies into a mapping.

Any thread may call in. One lock guards the table and the accesses through descriptors, which is what makes the promise of
`unmap` true: no access after it has returned. Messages are exchanged without the lock, since the reply may arrive on the
very thread that has an unmap to process.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from bisect import bisect_right
from typing import Final, NamedTuple

from mdevkit.errors import MdevError, wrap

from mdevkit_vfio.descriptors import check_no_append, is_memory, take_over
from mdevkit_vfio.ops import DmaRegion, DmaTransport
from mdevkit_vfio.proto import MAX_DMA_MAPS

#: Bounds on the maps one client may make a device hold, whoever calls its ops: each map with a descriptor is one of the latter. A
#: server lets a client give that many descriptors in all, for maps and interrupts together (`grants`).
MAX_MAPS: Final = MAX_DMA_MAPS
MAX_DESCRIPTORS: Final = 256

_ADDRESS_LIMIT: Final = 1 << 64
_FILE_LIMIT: Final = 1 << 63


class _Piece(NamedTuple):
    """The part of an access that lies in one region."""

    region: DmaRegion
    iova: int
    length: int

    @property
    def position(self) -> int:
        """Where it is in the region's file."""
        return self.region.offset + self.iova - self.region.iova


class Dma:
    """The maps of the client that is attached; empty, and every access EFAULT, while none is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transport: DmaTransport | None = None
        #: Sorted by address, and the regions in the same order.
        self._starts: list[int] = []
        self._regions: list[DmaRegion] = []
        self._descriptors = 0
        # Descriptors whose open file description is still the client's as well, so that pwrite cannot be relied on.
        self._foreign: set[int] = set()

    # -- the device's accesses --------------------------------------------------------------------------------------

    def read(self, iova: int, count: int) -> bytes:
        """Return `count` bytes of guest memory at address `iova`.

        EFAULT outside the maps, or where the client has truncated its memory; EACCES where the client let the device only
        write. Where no descriptor is shared this waits for the client (`DmaTransport.dma_read`): ENOTCONN, ETIMEDOUT, or
        EDEADLK inside a region access. What else its file system answers is an `MdevError` with that errno.
        """
        if count < 0:
            raise ValueError(f"a DMA read of {count} bytes")
        with self._lock:
            plan = self._plan(iova, count, write=False)
            shared = all(piece.region.fd >= 0 for piece in plan)
            parts = [_pread(piece) if piece.region.fd >= 0 else b"" for piece in plan]
            transport = self._transport
        if shared:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        for index, piece in enumerate(plan):
            if piece.region.fd < 0:
                parts[index] = _by_message(transport, piece).dma_read(piece.iova, piece.length)
        return b"".join(parts)

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` to guest memory at address `iova`; errors as `read`, EACCES where the device may only read.

        EPERM where the client has sealed its memory since, ENOMEM where memory of huge pages can be had no more. Nothing is written
        unless every byte lies in a map that allows it.
        """
        view = memoryview(data).cast("B")
        messages: list[tuple[_Piece, bytes]] = []
        with self._lock:
            for piece in self._plan(iova, len(view), write=True):
                start = piece.iova - iova
                part = view[start : start + piece.length]
                if piece.region.fd < 0:
                    messages.append((piece, bytes(part)))
                elif piece.region.fd in self._foreign:
                    _write_mapped(piece, part)
                else:
                    _pwrite(piece, part)
            transport = self._transport
        for piece, chunk in messages:
            _by_message(transport, piece).dma_write(piece.iova, chunk)

    def _plan(self, iova: int, count: int, *, write: bool) -> list[_Piece]:
        """Cut an access at the borders of the regions; adjoining regions make one range. The caller holds the lock."""
        plan: list[_Piece] = []
        index = bisect_right(self._starts, iova) - 1
        end = iova + count
        while iova < end:
            region = self._regions[index] if 0 <= index < len(self._regions) else None
            if region is None or not region.iova <= iova < region.iova + region.size:
                raise MdevError(errno.EFAULT, f"DMA address {iova:#x} is outside the memory the client has mapped")
            if not (region.writable if write else region.readable):
                what = "write to" if write else "read"
                raise MdevError(errno.EACCES, f"the client does not let the device {what} DMA address {iova:#x}")
            taken = min(end, region.iova + region.size) - iova
            plan.append(_Piece(region, iova, taken))
            iova += taken
            index += 1
        return plan

    # -- the client's requests --------------------------------------------------------------------------------------

    def map(self, region: DmaRegion) -> None:
        """DMA_MAP; owns ``region.fd`` unless this raises, and gives that number an open file description that nobody shares.

        EINVAL for an empty range, one beyond 64 bits, or a file for appending that cannot be opened again; EEXIST for a range that
        overlaps another, ENOSPC beyond `MAX_MAPS` maps, EMFILE beyond `MAX_DESCRIPTORS` descriptors.
        """
        end = region.iova + region.size
        beyond_file = region.fd >= 0 and (region.offset < 0 or region.offset + region.size > _FILE_LIMIT)
        if region.size <= 0 or region.iova < 0 or end > _ADDRESS_LIMIT or beyond_file:
            raise MdevError(errno.EINVAL, f"{_range(region.iova, region.size)} cannot be mapped")
        with self._lock:
            index = bisect_right(self._starts, region.iova)
            self._check_room(region, index, end)
            if region.fd >= 0 and is_memory(region.fd):
                self._take_over(region)
            self._starts.insert(index, region.iova)
            self._regions.insert(index, region)
            self._descriptors += region.fd >= 0

    def _check_room(self, region: DmaRegion, index: int, end: int) -> None:
        before = self._regions[index - 1] if index else None
        after = self._regions[index] if index < len(self._regions) else None
        for other in (before, after):
            if other is not None and other.iova < end and region.iova < other.iova + other.size:
                other_range = _range(other.iova, other.size)
                raise MdevError(errno.EEXIST, f"{_range(region.iova, region.size)} overlaps the mapped {other_range}")
        if len(self._regions) >= MAX_MAPS:
            raise MdevError(errno.ENOSPC, f"the client has {MAX_MAPS} DMA maps already, the most a device takes")
        if region.fd >= 0 and self._descriptors >= MAX_DESCRIPTORS:
            raise MdevError(errno.EMFILE, f"the client has {MAX_DESCRIPTORS} DMA maps with a descriptor, the most a device takes")

    def _take_over(self, region: DmaRegion) -> None:
        if not take_over(region.fd, writable=region.writable) and region.writable:
            check_no_append(region.fd)
            self._foreign.add(region.fd)

    def unmap(self, iova: int, size: int) -> None:
        """DMA_UNMAP of exactly one earlier map, else ENOENT. No access to it through its descriptor after the return."""
        with self._lock:
            index = bisect_right(self._starts, iova) - 1
            if index < 0 or self._starts[index] != iova or self._regions[index].size != size:
                raise MdevError(errno.ENOENT, f"{_range(iova, size)} is not a mapped range")
            del self._starts[index]
            self._forget(self._regions.pop(index))

    def unmap_all(self) -> None:
        """Every map goes away."""
        with self._lock:
            self._starts.clear()
            while self._regions:
                self._forget(self._regions.pop())

    def _forget(self, region: DmaRegion) -> None:
        if region.fd >= 0:
            self._descriptors -= 1
            self._foreign.discard(region.fd)
            os.close(region.fd)

    def attach(self, transport: DmaTransport) -> None:
        """Take up a client that is reached by `transport`."""
        with self._lock:
            self._transport = transport

    def detach(self) -> None:
        """Let go of the client: its maps go away, and messages fail with ENOTCONN."""
        with self._lock:
            self._transport = None
        self.unmap_all()

    @property
    def maps(self) -> int:
        """How many maps there are."""
        return len(self._regions)

    @property
    def descriptors(self) -> int:
        """How many descriptors of the client they hold."""
        return self._descriptors


def _pread(piece: _Piece) -> bytes:
    try:
        data = os.pread(piece.region.fd, piece.length, piece.position)
        if len(data) == piece.length:
            return data
        parts = [data]
        got = len(data)
        while data and got < piece.length:
            data = os.pread(piece.region.fd, piece.length - got, piece.position + got)
            parts.append(data)
            got += len(data)
    except OSError as error:
        raise wrap(error, f"the memory behind DMA address {piece.iova:#x} cannot be read") from error
    if got < piece.length:
        raise _truncated(piece)
    return b"".join(parts)


def _pwrite(piece: _Piece, data: memoryview) -> None:
    # Writing past its end would make the client's file grow, at the expense of whoever pays for the page.
    if os.fstat(piece.region.fd).st_size < piece.position + piece.length:
        raise _truncated(piece)
    done = 0
    try:
        while done < piece.length:
            done += os.pwrite(piece.region.fd, data[done:], piece.position + done)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise wrap(error, f"the memory behind DMA address {piece.iova:#x} cannot be written") from error
        # hugetlbfs has no write(2) (fs/hugetlbfs/inode.c, hugetlbfs_file_operations).
        _write_mapped(piece, data)


def _write_mapped(piece: _Piece, data: memoryview) -> None:
    """Write to a file through a mapping that lives as long as that takes.

    It is the kernel that copies, out of a file of ours: where the client's is cut off it stops, and a store would be SIGBUS.
    """
    file = piece.region.fd
    state = os.fstat(file)
    if state.st_size < piece.position + piece.length:
        raise _truncated(piece)
    # Mappings begin and end at whole pages of the file, or at its end.
    page = state.st_blksize
    before = piece.position % page
    whole = -(-(before + piece.length) // page) * page
    whole = min(whole, state.st_size - (piece.position - before))
    try:
        with (
            os.fdopen(os.memfd_create("dma"), "w+b", buffering=0) as source,
            mmap.mmap(file, whole, offset=piece.position - before) as window,
            memoryview(window)[before : before + piece.length] as target,
        ):
            source.write(data)
            done = os.preadv(source.fileno(), [target], 0)
    except ValueError:
        # The file has become too short to be mapped.
        raise _truncated(piece) from None
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise _truncated(piece) from None
        raise wrap(error, f"the memory behind DMA address {piece.iova:#x} cannot be mapped") from error
    if done < piece.length:
        raise _truncated(piece)


def _truncated(piece: _Piece) -> MdevError:
    return MdevError(errno.EFAULT, f"the client has truncated the memory behind DMA address {piece.iova:#x}")


def _by_message(transport: DmaTransport | None, piece: _Piece) -> DmaTransport:
    if transport is None:
        raise MdevError(errno.ENOTCONN, f"the client is gone, DMA address {piece.iova:#x} cannot be reached")
    return transport


def _range(iova: int, size: int) -> str:
    return f"DMA range {iova:#x} of {size:#x} bytes"
