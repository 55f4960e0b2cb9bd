"""The vhost-user wire format: numbers and layouts of its messages, packed and parsed in one place for both ends.

Layouts are those of QEMU's docs/interop/vhost-user.rst; numbers travel in the byte order of the host. A message is a
12-byte header and its payload; descriptors come with its first byte. Pure functions and value types: any thread may call
anything here. Parsers take the payload and raise `MdevError` EINVAL with a sentence that names the request.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

Buffer = bytes | bytearray | memoryview


class Request(IntEnum):
    """Messages of a frontend (``VHOST_USER_*``)."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Messages of a backend, on the socket it was given with SET_BACKEND_REQ_FD (``VHOST_USER_BACKEND_*``)."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES (``VHOST_USER_PROTOCOL_F_*``)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


#: Feature bits of the transport, beside the device's: the driver's writes are logged; there are protocol features.
F_LOG_ALL: Final = 1 << 26
F_PROTOCOL_FEATURES: Final = 1 << 30

#: The header's flags: two bits of version, then options.
VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3

#: request, flags, size of the payload
HEADER: Final = struct.Struct("=III")
HEADER_SIZE: Final = HEADER.size
#: Regions of one SET_MEM_TABLE, and so descriptors of one message.
MAX_TABLE_REGIONS: Final = 8
MAX_MSG_FDS: Final = MAX_TABLE_REGIONS
#: Bytes of configuration space one message carries (VHOST_USER_MAX_CONFIG_SIZE).
MAX_CONFIG_SIZE: Final = 256
#: The largest payload there is: all of SET_MEM_TABLE, or of the configuration space.
MAX_PAYLOAD: Final = max(8 + 32 * MAX_TABLE_REGIONS, 12 + MAX_CONFIG_SIZE)

#: SET_VRING_KICK, _CALL, _ERR: the queue's index, and the bit that says that no descriptor comes along.
VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 1 << 8
#: SET_VRING_ADDR: the device's writes to the used ring are logged (VHOST_VRING_F_LOG).
VRING_F_LOG: Final = 1

_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDR = struct.Struct("=IIQQQQ")
_REGION = struct.Struct("=QQQQ")
_REGION_COUNT = struct.Struct("=II")
_LOG = struct.Struct("=QQ")
_CONFIG = struct.Struct("=III")


class Header(NamedTuple):
    """The 12 bytes every message begins with; `size` is the payload's."""

    request: int
    flags: int
    size: int


def request_name(number: int) -> str:
    """Return a request's name; unknown numbers come back as ``request N``."""
    try:
        return Request(number).name
    except ValueError:
        return f"request {number}"


def message(request: int, payload: Buffer = b"", flags: int = 0) -> bytes:
    """Return a whole message; `flags` is `REPLY`, `NEED_REPLY` or 0."""
    return HEADER.pack(request, VERSION | flags, len(payload)) + payload


def reply(request: int, payload: Buffer = b"") -> bytes:
    """Return the reply to `request`; with `pack_u64` of 0 or an error as `payload` for one that needs nothing else."""
    return message(request, payload, REPLY)


def invalid(request: int, text: str) -> MdevError:
    """Return the EINVAL that refuses a message, with a sentence that starts with the request's name."""
    return MdevError(errno.EINVAL, f"{request_name(request)}: {text}")


def _fixed(request: int, payload: Buffer, size: int) -> None:
    if len(payload) != size:
        raise invalid(request, f"the payload has {len(payload)} bytes, not {size}")


def parse_empty(request: int, payload: Buffer) -> None:
    """Refuse a payload where there is none."""
    _fixed(request, payload, 0)


def pack_u64(number: int) -> bytes:
    """Return the payload of everything that is one number: features, status, MTU, replies."""
    return _U64.pack(number)


def parse_u64(request: int, payload: Buffer) -> int:
    """Read such a payload."""
    _fixed(request, payload, _U64.size)
    number: int = _U64.unpack(payload)[0]
    return number


@dataclass(frozen=True, slots=True)
class VringState:
    """A queue and a number: SET_VRING_NUM, _BASE, _ENABLE, and GET_VRING_BASE both ways (u32 each)."""

    index: int
    num: int = 0

    def pack(self) -> bytes:
        """Return the payload."""
        return _STATE.pack(self.index, self.num)

    @classmethod
    def parse(cls, request: int, payload: Buffer) -> VringState:
        """Read it."""
        _fixed(request, payload, _STATE.size)
        return cls(*_STATE.unpack(payload))


@dataclass(frozen=True, slots=True)
class VringAddr:
    """SET_VRING_ADDR: where a ring is in the frontend's own address space; `log` is the used ring's guest address."""

    index: int
    desc: int
    used: int
    avail: int
    flags: int = 0
    log: int = 0

    @property
    def logged(self) -> bool:
        """Whether the device's writes to the ring itself are to be logged."""
        return bool(self.flags & VRING_F_LOG)

    def same_place(self, other: VringAddr) -> bool:
        """Whether the ring is where `other` has it."""
        return (self.desc, self.used, self.avail) == (other.desc, other.used, other.avail)

    def pack(self) -> bytes:
        """Return the payload."""
        return _ADDR.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @classmethod
    def parse(cls, payload: Buffer) -> VringAddr:
        """Read it."""
        _fixed(Request.SET_VRING_ADDR, payload, _ADDR.size)
        index, flags, desc, used, avail, log = _ADDR.unpack(payload)
        return cls(index, desc, used, avail, flags, log)


@dataclass(frozen=True, slots=True)
class VringFd:
    """SET_VRING_KICK, _CALL, _ERR: a queue, and whether a descriptor comes along; without one there is none from now on."""

    index: int
    has_fd: bool

    def pack(self) -> bytes:
        """Return the payload; EINVAL for a queue it has no room for."""
        if not 0 <= self.index <= VRING_INDEX_MASK:
            raise MdevError(errno.EINVAL, f"queue {self.index} is beyond the {VRING_INDEX_MASK} of a vring descriptor message")
        return pack_u64(self.index | (0 if self.has_fd else VRING_NO_FD))

    @classmethod
    def parse(cls, request: int, payload: Buffer) -> VringFd:
        """Read it."""
        number = parse_u64(request, payload)
        return cls(number & VRING_INDEX_MASK, not number & VRING_NO_FD)


class MemRegion(NamedTuple):
    """A range of guest memory: guest address, bytes, frontend's address, offset in its file. ADD_MEM_REG, REM_MEM_REG."""

    guest: int
    size: int
    user: int
    offset: int = 0

    def pack(self) -> bytes:
        """Return the payload of ADD_MEM_REG and REM_MEM_REG."""
        return pack_u64(0) + _REGION.pack(*self)

    @classmethod
    def parse(cls, request: int, payload: Buffer) -> MemRegion:
        """Read it."""
        _fixed(request, payload, _U64.size + _REGION.size)
        return cls(*_REGION.unpack_from(payload, _U64.size))


def pack_mem_table(regions: Iterable[MemRegion]) -> bytes:
    """Return the payload of SET_MEM_TABLE."""
    packed = [_REGION.pack(*region) for region in regions]
    return _REGION_COUNT.pack(len(packed), 0) + b"".join(packed)


def parse_mem_table(payload: Buffer) -> list[MemRegion]:
    """Read SET_MEM_TABLE. Its payload may be longer than its regions need: DPDK always sends room for all."""
    request = Request.SET_MEM_TABLE
    if len(payload) < _REGION_COUNT.size:
        raise invalid(request, f"the payload has {len(payload)} bytes, {_REGION_COUNT.size} are needed")
    count = _REGION_COUNT.unpack_from(payload)[0]
    if count > MAX_TABLE_REGIONS:
        raise invalid(request, f"{count} regions, {MAX_TABLE_REGIONS} are the most")
    if len(payload) < _REGION_COUNT.size + count * _REGION.size:
        raise invalid(request, f"{count} regions do not fit {len(payload)} bytes")
    return [MemRegion(*_REGION.unpack_from(payload, _REGION_COUNT.size + i * _REGION.size)) for i in range(count)]


class LogBase(NamedTuple):
    """SET_LOG_BASE: bytes of the dirty log, and where it begins in its file."""

    size: int
    offset: int

    def pack(self) -> bytes:
        """Return the payload."""
        return _LOG.pack(*self)

    @classmethod
    def parse(cls, payload: Buffer) -> LogBase:
        """Read it."""
        _fixed(Request.SET_LOG_BASE, payload, _LOG.size)
        return cls(*_LOG.unpack(payload))


@dataclass(frozen=True, slots=True)
class Config:
    """GET_CONFIG and SET_CONFIG, both ways. `data` has as many bytes as are asked for; an empty reply refuses GET_CONFIG."""

    offset: int
    data: bytes
    flags: int = 0

    def pack(self) -> bytes:
        """Return the payload."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def parse(cls, request: int, payload: Buffer) -> Config:
        """Read it: the size it names is that of what follows, 1 to `MAX_CONFIG_SIZE`."""
        if len(payload) < _CONFIG.size:
            raise invalid(request, f"the payload has {len(payload)} bytes, {_CONFIG.size} are needed")
        offset, size, flags = _CONFIG.unpack_from(payload)
        if not 0 < size <= MAX_CONFIG_SIZE:
            raise invalid(request, f"{size} bytes of configuration are outside 1 to {MAX_CONFIG_SIZE}")
        if len(payload) != _CONFIG.size + size:
            raise invalid(request, f"{size} bytes of configuration in a payload of {len(payload)}")
        return cls(offset, bytes(payload[_CONFIG.size :]), flags)
