"""What each vfio-user command means in terms of the device's ops.

A `Commands` lives as long as its client. It checks every request against the wire rules and the limits before the device
sees it, and is used on the connection's thread alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

from mdevkit_vfio import proto
from mdevkit_vfio.descriptors import check_eventfd, check_memory
from mdevkit_vfio.grants import Grants
from mdevkit_vfio.memory import SEALS
from mdevkit_vfio.ops import DmaRegion, IrqRequest, Mapping, MigrationOps, RegionInfo, VfioOps
from mdevkit_vfio.proto import Command
from mdevkit_vfio.throttle import Turn
from mdevkit_vfio.uapi import FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Feature, IrqSet, MigrationState, RegionFlag

log = logging.getLogger("mdevkit.vfio")

#: An access longer than this reaches the device in parts, so that other sessions of the process get in between.
PART: Final = 128


class Answer(NamedTuple):
    """A reply's payload, and descriptors that go with it and stay the device's."""

    payload: bytes
    fds: Sequence[int]


#: A register read taken apart: region, offset, count, and what lies between id and data in the reply to it.
KnownRead = tuple[int, int, int, bytes]
#: How many register reads, and ends of interrupts, are remembered: against a client that never repeats itself.
_KNOWN_READS: Final = 1024
_KNOWN_IRQS: Final = 16
#: Bytes of the message id, which comes first, and of what comes before the data of an access.
_ID_SIZE: Final = 2
_HEAD_SIZE: Final = proto.ACCESS.size

Handler = Callable[[memoryview, list[int]], bytes | Answer]


class Commands:
    """The commands a client may send after VERSION.

    `limit` is the negotiated max_data_xfer_size in bytes, `max_fds` the number of descriptors the client takes with a message.
    """

    def __init__(self, ops: VfioOps, turn: Turn, limit: int, max_fds: int) -> None:
        self.grants: Final = Grants()
        self._ops: Final = ops
        self._turn: Final = turn
        self._limit: Final = limit
        self._sends_files: Final = max_fds > 0
        #: The longest access the device gets in one part.
        self.most: Final = min(PART, limit)
        info = ops.info()
        regions = [ops.region_info(index) for index in range(info.num_regions)]
        #: Size in bytes of each region as far as it may be read and written; 0 where not. Fixed for one client.
        self.readable: Final = [region.size if region.flags & RegionFlag.READ else 0 for region in regions]
        self.writable: Final = [region.size if region.flags & RegionFlag.WRITE else 0 for region in regions]
        #: UNMASK requests that are known to be good.
        self._known_irqs: Final[dict[bytes, IrqRequest]] = {}
        self._irqs: Final = [_irq_count(ops, index) for index in range(info.num_irqs)]
        #: Whole REGION_READ messages, without the id, that are known to be good.
        self.reads: Final[dict[bytes, KnownRead]] = {}
        #: Command number to handler; None where there is no such command from a client.
        self.table: Final[list[Handler | None]] = self._table()

    def _table(self) -> list[Handler | None]:
        handlers: dict[Command, Handler] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
            Command.REGION_WRITE_MULTI: self._write_multi,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._mig_read,
            Command.MIG_DATA_WRITE: self._mig_write,
        }
        table: list[Handler | None] = [None] * (max(Command) + 1)
        for command, handler in handlers.items():
            table[command] = handler if command in _TAKES_FDS else _without_fds(command, handler)
        return table

    # -- information ------------------------------------------------------------------------------------------------

    def _get_info(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        proto.parse_device_info_request(payload)
        return proto.pack_device_info(self._ops.info())

    def _get_region_info(self, payload: memoryview, fds: list[int]) -> Answer:
        del fds
        request = proto.parse_region_info_request(payload)
        self._check_region(Command.DEVICE_GET_REGION_INFO, request.index)
        info = self._ops.region_info(request.index)
        if info.mapping is not None and not (self._sends_files and _sealed(request.index, info.mapping)):
            info = RegionInfo(info.flags & ~RegionFlag.MMAP, info.size, None, info.type)
        files = [info.mapping.fd] if info.mapping is not None else []
        return Answer(proto.pack_region_info(request.index, info, request.argsz), files)

    def _get_region_io_fds(self, payload: memoryview, fds: list[int]) -> bytes:
        """No device of ours has ioeventfds, so every region that exists has an empty list of them."""
        del fds
        index = proto.parse_io_fds_request(payload).index
        self._check_region(Command.DEVICE_GET_REGION_IO_FDS, index)
        if not (self.readable[index] or self.writable[index]):
            raise proto.invalid(Command.DEVICE_GET_REGION_IO_FDS, f"region {index} does not exist")
        return proto.pack_no_io_fds(index)

    def _get_irq_info(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        index = proto.parse_irq_info_request(payload).index
        if index >= len(self._irqs):
            raise proto.invalid(Command.DEVICE_GET_IRQ_INFO, f"index {index} does not exist")
        return proto.pack_irq_info(index, self._ops.irq_info(index))

    def _check_region(self, command: Command, index: int) -> None:
        if index >= len(self.readable):
            raise proto.invalid(command, f"region {index} does not exist")

    # -- regions ----------------------------------------------------------------------------------------------------

    def _region_read(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        access = proto.parse_region_read(payload)
        self._check_access(Command.REGION_READ, self.readable, access.region, access.offset, access.count)
        parts = [self._ops.read(access.region, at, size) for at, size in self._parts(access.offset, access.count)]
        returned = sum(map(len, parts))
        if returned != access.count:
            raise MdevError(errno.EIO, f"the device returned {returned} bytes for a read of {access.count}")
        return b"".join((access.pack(), *parts))

    def learn_read(self, request: bytes) -> KnownRead | None:
        """Take apart a message of the length of a REGION_READ, without its id, and remember it in `reads`.

        None if it is no read, or one that is refused, or too long to be done in one part.
        """
        _, *head, _, offset, region, count = proto.READ.unpack(bytes(_ID_SIZE) + request)
        if head != [Command.REGION_READ, proto.READ.size, proto.TYPE_COMMAND]:
            return None
        size = self.readable[region] if region < len(self.readable) else 0
        if not 0 < count <= self.most or offset + count > size:
            return None
        reply = proto.reply_head(0, Command.REGION_READ, len(request) - proto.HEADER_SIZE + _ID_SIZE + count)
        known = region, offset, count, reply[_ID_SIZE:] + request[proto.HEADER_SIZE - _ID_SIZE :]
        if len(self.reads) >= _KNOWN_READS:
            self.reads.clear()
        self.reads[request] = known
        return known

    def _region_write(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        head = bytes(payload[:_HEAD_SIZE])
        offset, region, count = proto.parse_region_write(payload)
        self._check_access(Command.REGION_WRITE, self.writable, region, offset, count)
        if count <= self.most:
            self._ops.write(region, offset, bytes(payload[_HEAD_SIZE:]))
            return head
        begin = _HEAD_SIZE - offset
        for at, size in self._parts(offset, count):
            self._ops.write(region, at, bytes(payload[begin + at : begin + at + size]))
        return head

    def _write_multi(self, payload: memoryview, fds: list[int]) -> bytes:
        """All writes are checked before the first is done; one the device refuses ends the message there."""
        del fds
        for write in proto.parse_write_multi(payload):
            self._check_access(Command.REGION_WRITE_MULTI, self.writable, write.region, write.offset, len(write.data))
            self._turn.step()
        count = 0
        for write in proto.parse_write_multi(payload):
            self._ops.write(write.region, write.offset, write.data)
            self._turn.step()
            count += 1
        return proto.pack_write_multi_reply(count)

    def _check_access(self, command: Command, sizes: Sequence[int], region: int, offset: int, count: int) -> None:
        if region >= len(sizes) or offset + count > sizes[region] or count > self._limit:
            raise proto.invalid(command, f"{count} bytes at {offset:#x} are outside region {region} or too many")

    def _parts(self, offset: int, count: int) -> Iterator[tuple[int, int]]:
        """Cut an access at multiples of `PART`, which keeps aligned registers whole."""
        end = offset + count
        while offset < end:
            size = min(end - offset, PART - offset % PART)
            yield offset, size
            offset += size
            if offset < end:
                self._turn.step()

    def _reset(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        if payload:
            raise proto.invalid(Command.DEVICE_RESET, f"a payload of {len(payload)} bytes, where there is none")
        self._ops.reset()
        return b""

    # -- interrupts -------------------------------------------------------------------------------------------------

    def _set_irqs(self, payload: memoryview, fds: list[int]) -> bytes:
        known = self._known_irqs.get(bytes(payload)) if not fds else None
        if known is not None:
            self._ops.set_irqs(known)
            return b""
        request = proto.SetIrqs.parse(payload, len(fds), self._irqs)
        for fd in fds:
            check_eventfd(fd)
        if fds:
            self._arm(request, fds)
            return b""
        eventfds = (-1,) * request.count if request.flags & IrqSet.DATA_EVENTFD else ()
        wanted = _irq_request(request, eventfds)
        self._ops.set_irqs(wanted)
        if eventfds or not request.count:
            self.grants.disarmed(request.flags, request.index, request.start, request.count)
        elif request.flags == _UNMASK and len(self._known_irqs) < _KNOWN_IRQS:
            # The end of every interrupt of a guest that uses INTx.
            self._known_irqs[bytes(payload)] = wanted
        return b""

    def _arm(self, request: proto.SetIrqs, fds: list[int]) -> None:
        copies = self.grants.duplicate(request.flags, request.index, request.start, fds)
        given = tuple(fds)
        # From here on they are the device's, even if it refuses them.
        fds.clear()
        with self.grants.arming(copies):
            self._ops.set_irqs(_irq_request(request, given))

    # -- guest memory -----------------------------------------------------------------------------------------------

    def _dma_map(self, payload: memoryview, fds: list[int]) -> bytes:
        request = proto.DmaMap.parse(payload, len(fds))
        readable = bool(request.flags & proto.DMA_READABLE)
        writable = bool(request.flags & proto.DMA_WRITEABLE)
        self.grants.check_map(bool(fds))
        fd = -1
        if fds:
            fd = fds[0]
            check_memory(fd, request.offset + request.size, readable=readable, writable=writable)
        self._ops.dma_map(DmaRegion(request.iova, request.size, readable, writable, fd, request.offset))
        fds.clear()
        self.grants.map(request.iova, fd >= 0)
        return b""

    def _dma_unmap(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        request = proto.DmaUnmap.parse(payload)
        if request.all:
            self._ops.dma_unmap_all()
            self.grants.unmap_all()
        else:
            self._ops.dma_unmap(request.iova, request.size)
            self.grants.unmap(request.iova)
        return request.pack()

    # -- features and migration -------------------------------------------------------------------------------------

    def _feature(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        request = proto.FeatureRequest.parse(payload)
        migration = self._migration(Command.DEVICE_FEATURE)
        supported, size = _FEATURES.get(request.number, (0, 0))
        if not supported:
            raise MdevError(errno.ENOTTY, f"DEVICE_FEATURE: the device has no feature {request.number}")
        request.check(supported, size)
        if request.flags & FEATURE_PROBE:
            return request.pack()
        if request.flags & FEATURE_SET:
            migration.set_state(_state(request.data))
            return request.pack()
        return request.answer(_feature_data(migration, request.number))

    def _mig_read(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        size = proto.parse_mig_read(payload, self._limit)
        data = self._migration(Command.MIG_DATA_READ).read(size)
        if len(data) > size:
            raise MdevError(errno.EIO, f"the device returned {len(data)} bytes of migration data for {size}")
        return proto.pack_mig_data(len(data), data)

    def _mig_write(self, payload: memoryview, fds: list[int]) -> bytes:
        del fds
        data = proto.parse_mig_data(Command.MIG_DATA_WRITE, payload, self._limit)
        self._migration(Command.MIG_DATA_WRITE).write(data)
        return b""

    def _migration(self, command: Command) -> MigrationOps:
        """Return the device's migration; ENOTTY as the kernel says it where there is none."""
        if self._ops.migration is None:
            raise MdevError(errno.ENOTTY, f"{command.name}: the device cannot migrate")
        return self._ops.migration


#: Feature number to what may be done with it and the bytes of its data. The logging of DMA (6 to 8) is for devices whose
#: DMA the client cannot see, which ENOTTY says we are not: every write to guest memory is the client's own file or message.
_FEATURES: Final = {
    int(Feature.MIGRATION): (FEATURE_GET, proto.U64_SIZE),
    int(Feature.MIG_DEVICE_STATE): (FEATURE_GET | FEATURE_SET, proto.MIG_STATE_SIZE),
    int(Feature.MIG_DATA_SIZE): (FEATURE_GET, proto.U64_SIZE),
}

_UNMASK: Final = int(IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK)
_TAKES_FDS: Final = (Command.DMA_MAP, Command.DEVICE_SET_IRQS)


def _feature_data(migration: MigrationOps, number: int) -> bytes:
    if number == Feature.MIGRATION:
        return proto.pack_u64(migration.flags)
    if number == Feature.MIG_DATA_SIZE:
        return proto.pack_u64(migration.data_size())
    return proto.pack_mig_state(migration.state)


def _state(data: bytes) -> MigrationState:
    number = proto.parse_mig_state(data)
    try:
        return MigrationState(number)
    except ValueError:
        raise proto.invalid(Command.DEVICE_FEATURE, f"there is no device state {number}") from None


def _irq_count(ops: VfioOps, index: int) -> int:
    """Return how many interrupts an index has: none where the device knows of no such index, as Linux's mtty of most."""
    try:
        return ops.irq_info(index).count
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


def _irq_request(request: proto.SetIrqs, fds: Sequence[int]) -> IrqRequest:
    return IrqRequest(IrqSet(request.flags), request.index, request.start, request.count, request.bools, fds)


def _without_fds(command: Command, handler: Handler) -> Handler:
    """Wrap the handler of a command that takes no descriptors."""

    def handle(payload: memoryview, fds: list[int]) -> bytes | Answer:
        if fds:
            raise proto.invalid(command, f"{len(fds)} descriptors, where there are none")
        return handler(payload, fds)

    return handle


def _sealed(index: int, mapping: Mapping) -> bool:
    """Return whether the client cannot shrink a file under the device's own mapping; if it could, it does not get it."""
    with contextlib.suppress(OSError):
        if fcntl.fcntl(mapping.fd, fcntl.F_GET_SEALS) & SEALS == SEALS:
            return True
    log.error("region %d is not mappable: its file is not a memfd sealed against resizing", index)
    return False
