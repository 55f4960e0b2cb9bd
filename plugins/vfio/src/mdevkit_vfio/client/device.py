"""The client proper: a device's regions, interrupts, DMA and migration over one connection.

Any thread may call in; requests of different threads are independent of each other. What the server refuses is an
`MdevError` with the server's errno.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mdevkit.errors import MdevError, errno_name, wrap

from mdevkit_vfio import proto
from mdevkit_vfio.client.channel import Channel, Reply
from mdevkit_vfio.client.memory import GuestMemory
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.ops import DeviceInfo, IrqInfo, SparseArea
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import (
    FEATURE_GET,
    FEATURE_PROBE,
    FEATURE_SET,
    Feature,
    IrqSet,
    MigrationFlag,
    MigrationState,
    Region,
    RegionFlag,
)

TIMEOUT: Final = 5.0


class RegionClient:
    """One region of the device. Offsets and sizes in bytes; integers are little-endian, as on PCI."""

    def __init__(self, device: VfioUserClient, info: proto.RegionInfo, fd: int) -> None:
        self._device: Final = device
        self._info: Final = info
        #: The file behind a mappable region, -1 without; closed with the client.
        self.fd: Final = fd

    @property
    def index(self) -> int:
        """The region's number."""
        return self._info.index

    @property
    def size(self) -> int:
        """Length; 0 for a region that does not exist."""
        return self._info.size

    @property
    def flags(self) -> RegionFlag:
        """What may be done with it."""
        return self._info.flags

    @property
    def type(self) -> tuple[int, int] | None:
        """Type and subtype of a device-specific region."""
        return self._info.type

    @property
    def areas(self) -> Sequence[SparseArea]:
        """The parts that may be mapped; none if it cannot be mapped."""
        if self.fd < 0:
            return ()
        return self._info.areas or (SparseArea(0, self.size),)

    def read(self, offset: int, count: int) -> bytes:
        """Read bytes by message; long reads are several messages."""
        step = self._device.max_transfer
        parts = [self._read(at, min(step, offset + count - at)) for at in range(offset, offset + count, step)]
        return b"".join(parts)

    def _read(self, offset: int, count: int) -> bytes:
        payload = self._device.call(Command.REGION_READ, proto.Access(offset, self.index, count).pack())
        access, data = proto.parse_region_data(Command.REGION_READ, payload)
        if access.count != count:
            raise MdevError(errno.EIO, f"{access.count} bytes for a read of {count}")
        return bytes(data)

    def write(self, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write bytes by message; `posted` waits for no reply, and learns of no error."""
        step = self._device.max_transfer
        for at in range(0, len(data), step):
            part = data[at : at + step]
            payload = proto.Access(offset + at, self.index, len(part)).pack() + part
            if posted:
                self._device.channel.post(Command.REGION_WRITE, payload)
            else:
                self._device.call(Command.REGION_WRITE, payload)

    def read_int(self, offset: int, size: int) -> int:
        """Read a register of 1, 2, 4 or 8 bytes."""
        return int.from_bytes(self._read(offset, size), "little")

    def write_int(self, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        """Write a register of 1, 2, 4 or 8 bytes."""
        self.write(offset, value.to_bytes(size, "little"), posted=posted)

    def map(self, area: SparseArea | None = None) -> mmap.mmap:
        """Map an area, by default the first: loads and stores then reach the device's memory without a message.

        The mapping outlives the client. ENODEV for a region that cannot be mapped.
        """
        if not self.areas:
            raise MdevError(errno.ENODEV, f"region {self.index} cannot be mapped", self)
        area = area or self.areas[0]
        access = mmap.ACCESS_WRITE if self.flags & RegionFlag.WRITE else mmap.ACCESS_READ
        return mmap.mmap(self.fd, area.size, access=access, offset=self._info.offset + area.offset)


class Interrupt:
    """An armed interrupt: an eventfd of ours that the device signals."""

    def __init__(self, index: int, number: int) -> None:
        #: ``VFIO_PCI_*_IRQ_INDEX`` and the number within it.
        self.index: Final = index
        self.number: Final = number
        #: The eventfd; closed with the client.
        self.fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wait(self, timeout: float | None = None) -> int:
        """Wait up to `timeout` seconds for a signal; return how many came since the last call, 0 if none did."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return 0
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.fd)


class MigrationClient:
    """The migration of one device (VFIO migration protocol v2)."""

    def __init__(self, device: VfioUserClient) -> None:
        self._device: Final = device

    @property
    def flags(self) -> MigrationFlag:
        """What the device can do; ENOTTY if it cannot migrate."""
        return MigrationFlag(proto.parse_u64(self._device.feature(Feature.MIGRATION, FEATURE_GET)))

    @property
    def state(self) -> MigrationState:
        """The device's state; set it to walk there, EINVAL for an arc the device refuses."""
        return MigrationState(proto.parse_mig_state(self._device.feature(Feature.MIG_DEVICE_STATE, FEATURE_GET)))

    @state.setter
    def state(self, wanted: MigrationState) -> None:
        self._device.feature(Feature.MIG_DEVICE_STATE, FEATURE_SET, proto.pack_mig_state(wanted))

    @property
    def data_size(self) -> int:
        """The estimated length of the stream in STOP_COPY, in bytes."""
        return proto.parse_u64(self._device.feature(Feature.MIG_DATA_SIZE, FEATURE_GET))

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes of the outgoing stream; less means that no more is there now."""
        payload = self._device.call(Command.MIG_DATA_READ, proto.pack_mig_data(count))
        return proto.parse_mig_data(Command.MIG_DATA_READ, payload, count)

    def stream(self, step: int = 1 << 16) -> Iterator[bytes]:
        """Yield the outgoing stream up to its present end, in parts of `step` bytes or less."""
        step = min(step, self._device.max_transfer)
        while part := self.read(step):
            yield part

    def write(self, data: bytes) -> None:
        """Append to the incoming stream."""
        step = self._device.max_transfer
        for at in range(0, len(data), step):
            part = data[at : at + step]
            self._device.call(Command.MIG_DATA_WRITE, proto.pack_mig_data(len(part), part))


def migrate(source: VfioUserClient, target: VfioUserClient, *, pre_copy: bool = False) -> bytes:
    """Move a device's state to another of the same type, which then runs; return the stream.

    `pre_copy` begins to copy while the source still runs. On an error both devices stay in the state they have reached.
    """
    moved = bytearray()
    target.migration.state = MigrationState.RESUMING
    for state in (MigrationState.PRE_COPY, MigrationState.STOP_COPY) if pre_copy else (MigrationState.STOP_COPY,):
        source.migration.state = state
        for part in source.migration.stream():
            target.migration.write(part)
            moved += part
    source.migration.state = MigrationState.STOP
    target.migration.state = MigrationState.RUNNING
    return bytes(moved)


class VfioUserClient:
    """A connection to a vfio-user device. Use `connect`, and the result as a context manager."""

    def __init__(self, channel: Channel, version: proto.Version, max_transfer: int) -> None:
        #: The connection, for what this class does not offer.
        self.channel: Final = channel
        #: The most data of one message, in bytes: the smaller of both sides' limits.
        self.max_transfer: Final = min(max_transfer, version.capabilities.max_data_xfer_size, proto.MAX_DATA_XFER_SIZE)
        #: What the server answered.
        self.version: Final = version
        #: The device's migration.
        self.migration: Final = MigrationClient(self)
        self._regions: Final[dict[int, RegionClient]] = {}
        self._interrupts: Final[dict[tuple[int, int], Interrupt]] = {}
        self._memory: Final[list[GuestMemory]] = []

    @classmethod
    def connect(
        cls,
        path: str | Path,
        *,
        timeout: float = TIMEOUT,
        minor: int = proto.MINOR,
        capabilities: proto.Capabilities = proto.OURS,
    ) -> Self:
        """Connect to the server at `path` and agree on a version.

        `timeout` in seconds for each reply; QEMU's is 5, which is therefore what a device must keep to. `minor` and
        `capabilities` are what the client proposes. ENOENT and ECONNREFUSED where nobody listens, EBUSY where the device has
        a client, EPROTO for an answer outside what was proposed.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fsencode(path))
        except OSError as error:
            sock.close()
            raise wrap(error, f"cannot connect to {path}", path) from error
        channel = Channel(sock, timeout)
        try:
            version = _agree(channel, proto.Version(proto.MAJOR, minor, capabilities))
            return cls(channel, version, capabilities.max_data_xfer_size)
        except BaseException:
            channel.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the device, which is reset and free for others. Closes every descriptor of ours; harmless twice."""
        self.channel.close()
        while self._interrupts:
            self._interrupts.popitem()[1].close()
        while self._memory:
            self._memory.pop().close()
        while self._regions:
            close_all(fd for fd in (self._regions.popitem()[1].fd,) if fd >= 0)

    # -- requests ---------------------------------------------------------------------------------------------------

    def transact(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> Reply:
        """Send any message and return its reply as it is, an error reply too; for tests and experiments."""
        return self.channel.request(command, payload, fds, flags)

    def call(self, command: Command, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a command and return its reply's payload; an error reply is raised."""
        reply = self.channel.request(command, payload, fds)
        close_all(reply.fds)
        return _checked(reply).payload

    @property
    def info(self) -> DeviceInfo:
        """GET_INFO."""
        return proto.parse_device_info(self.call(Command.DEVICE_GET_INFO, proto.pack_device_info_request()))

    def reset(self) -> None:
        """Reset the device; interrupts and memory stay."""
        self.call(Command.DEVICE_RESET)

    def feature(self, feature: Feature, flags: int, data: bytes = b"") -> bytes:
        """GET, SET or PROBE a device feature; returns its data."""
        request = proto.FeatureRequest(proto.FEATURE_ROOM, flags | feature, data)
        return proto.FeatureRequest.parse(self.call(Command.DEVICE_FEATURE, request.pack())).data

    def can(self, feature: Feature, flags: int = 0) -> bool:
        """Whether the device has a feature, for GET and SET as `flags` say."""
        request = proto.FeatureRequest(proto.FEATURE_ROOM, FEATURE_PROBE | flags | feature)
        return self.transact(Command.DEVICE_FEATURE, request.pack()).ok

    # -- regions ----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> RegionClient:
        """Configuration space."""
        return self.region(Region.CONFIG)

    def region(self, index: int) -> RegionClient:
        """Return a region; EINVAL for a number the device does not have."""
        if index not in self._regions:
            self._regions[index] = self._ask_region(index)
        return self._regions[index]

    def _ask_region(self, index: int) -> RegionClient:
        reply = _checked(self.transact(Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(index)))
        info = proto.parse_region_info(reply.payload)
        if info.needed > len(reply.payload):
            close_all(reply.fds)
            request = proto.pack_region_info_request(index, info.needed)
            reply = _checked(self.transact(Command.DEVICE_GET_REGION_INFO, request))
            info = proto.parse_region_info(reply.payload)
        close_all(reply.fds[1:])
        return RegionClient(self, info, reply.fds[0] if reply.fds else -1)

    def write_multi(self, writes: Sequence[proto.Write], *, posted: bool = False) -> int:
        """Do several writes of 1 to 8 bytes with one message; return how many were done, all of them if `posted`."""
        payload = proto.pack_write_multi(writes)
        if posted:
            self.channel.post(Command.REGION_WRITE_MULTI, payload)
            return len(writes)
        return proto.parse_write_multi_reply(self.call(Command.REGION_WRITE_MULTI, payload))

    # -- interrupts -------------------------------------------------------------------------------------------------

    def irq_info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO."""
        return proto.parse_irq_info(self.call(Command.DEVICE_GET_IRQ_INFO, proto.pack_irq_info_request(index)))

    def arm(self, index: int, count: int = 1, start: int = 0) -> list[Interrupt]:
        """Have the device signal an eventfd of ours for each of `count` interrupts; the list is theirs."""
        interrupts = [Interrupt(index, number) for number in range(start, start + count)]
        step = self.version.capabilities.max_msg_fds
        try:
            for at in range(0, count, step):
                part = interrupts[at : at + step]
                self.set_irqs(index, IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, start + at, len(part), [i.fd for i in part])
        except BaseException:
            for interrupt in interrupts:
                interrupt.close()
            raise
        for interrupt in interrupts:
            replaced = self._interrupts.pop((index, interrupt.number), None)
            if replaced is not None:
                replaced.close()
            self._interrupts[index, interrupt.number] = interrupt
        return interrupts

    def disarm(self, index: int) -> None:
        """Switch all interrupts of an index off; their `Interrupt` objects are closed."""
        self.set_irqs(index, IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 0, 0)
        for key in [key for key in self._interrupts if key[0] == index]:
            self._interrupts.pop(key).close()

    def mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Hold interrupts back."""
        self.set_irqs(index, IrqSet.DATA_NONE | IrqSet.ACTION_MASK, start, count)

    def unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Let interrupts through; for INTx also the end of the interrupt."""
        self.set_irqs(index, IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK, start, count)

    def trigger(self, index: int, start: int = 0, count: int = 1) -> None:
        """Have the device signal interrupts as a test."""
        self.set_irqs(index, IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, start, count)

    def set_irqs(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        fds: Sequence[int] = (),
        bools: Iterable[bool] = (),
    ) -> None:
        """Send any SET_IRQS; `fds` stay ours."""
        payload = proto.SetIrqs(flags, index, start, count, tuple(bools)).pack()
        self.call(Command.DEVICE_SET_IRQS, payload, fds)

    # -- guest memory -----------------------------------------------------------------------------------------------

    def dma_map(self, iova: int, size: int, *, shared: bool = True, readable: bool = True, writable: bool = True) -> GuestMemory:
        """Let the device reach `size` bytes of new memory at `iova`, both multiples of 4096.

        Not `shared`, it has to ask for the data, and threads of the client's answer.
        """
        memory = GuestMemory(iova, size, shared=shared, readable=readable, writable=writable)
        self._memory.append(memory)
        if not shared:
            self.channel.listen(self._answer)
        try:
            self.call(Command.DMA_MAP, memory.request(), [memory.fd] if shared else [])
        except BaseException:
            self._memory.remove(memory)
            memory.close()
            raise
        return memory

    def dma_unmap(self, memory: GuestMemory) -> None:
        """Take memory away from the device, and close it."""
        self.call(Command.DMA_UNMAP, proto.DmaUnmap(0, memory.iova, memory.size).pack())
        self._memory.remove(memory)
        memory.close()

    def dma_unmap_all(self) -> None:
        """Take all memory away from the device, and close it."""
        self.call(Command.DMA_UNMAP, proto.DmaUnmap(proto.UNMAP_ALL, 0, 0).pack())
        while self._memory:
            self._memory.pop().close()

    def _answer(self, command: int, payload: bytes) -> bytes:
        """Answer a DMA message of the server's."""
        if command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise MdevError(errno.EINVAL, f"{proto.command_name(command)} is not for a server to send")
        access, data = proto.parse_dma_access(Command(command), payload, command == Command.DMA_WRITE)
        for memory in list(self._memory):
            if memory.holds(access.iova, access.count):
                return memory.answer(command, access, data)
        raise MdevError(errno.EFAULT, f"{access.count} bytes at {access.iova:#x} are not mapped")


def _agree(channel: Channel, proposed: proto.Version) -> proto.Version:
    reply = _checked(channel.request(Command.VERSION, proposed.pack()))
    close_all(reply.fds)
    answer = proto.Version.parse(reply.payload)
    if answer.major != proposed.major or answer.minor > proposed.minor:
        raise MdevError(
            errno.EPROTO, f"the server answers version {answer.major}.{answer.minor} to {proposed.major}.{proposed.minor}"
        )
    return answer


def _checked(reply: Reply) -> Reply:
    if not reply.ok:
        close_all(reply.fds)
        name = proto.command_name(reply.command)
        raise MdevError(reply.error or errno.EIO, f"the server refuses {name}: {errno_name(reply.error)}")
    return reply
