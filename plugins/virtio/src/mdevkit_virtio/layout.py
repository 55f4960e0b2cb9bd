"""Numbers and formats of virtqueues (virtio 1.2, sections 2.7 and 2.8), and what can be wrong with one.

Shared by both engines, which must agree on every value here; nothing in this module touches guest memory. Immutable,
so any thread may use it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit_virtio.memory import DirtyLog, MemoryTable, Piece


class Feature(IntFlag):
    """Feature bits that change how rings and frames look (virtio 1.2, section 6 and 5.1.3)."""

    NET_MRG_RXBUF = 1 << 15
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35


class Desc(IntFlag):
    """Flags of a descriptor (2.7.5, 2.8.1)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    AVAIL = 1 << 7
    USED = 1 << 15


class Event(IntEnum):
    """What a packed ring's event suppression structure asks for (2.8.10)."""

    ENABLE = 0
    DISABLE = 1
    DESC = 2


class Fault(IntEnum):
    """Why a ring is broken. A broken ring is not touched again until it is started anew."""

    OK = 0
    INDEX = 1
    HEAD = 2
    LOOP = 3
    INDIRECT = 4
    ORDER = 5
    ADDRESS = 6
    LENGTH = 7
    MEMORY = 8
    LOG = 9
    BUFFER = 10


class Wait(IntEnum):
    """What a burst ended for: its limit, no frame, no room for the frame, a broken ring."""

    MORE = 0
    EMPTY = 1
    FULL = 2
    BROKEN = 3


#: No feature negotiated.
NO_FEATURES: Final = Feature(0)
#: Pieces one chain may have; with one address range per piece that is what QEMU and Linux's vhost accept too.
MAX_PIECES: Final = 1024
#: Buffers, and pieces of them, that one `take` returns at most.
MAX_TAKE: Final = 128
MAX_TAKE_PIECES: Final = 4 * MAX_PIECES
#: Frames of one burst, buffers one frame may be spread over, bytes of one frame (64 KiB of a GSO frame and its headers).
MAX_BURST: Final = 128
MAX_MERGE: Final = 1024
MAX_FRAME: Final = 69632
#: Largest ring (2.7, 2.8: Queue Size).
MAX_SIZE: Final = 32768
#: Bytes of a page in a dirty log (vhost-user, "Migration").
LOG_PAGE_SHIFT: Final = 12
#: A chain's length is told in 32 bits when it is given back (2.7.8).
MAX_LENGTH: Final = 0xFFFFFFFF

_REASONS: Final = {
    Fault.INDEX: ("more buffers are available than the ring has (index {0})", errno.EINVAL),
    Fault.HEAD: ("descriptor {0} does not exist", errno.EINVAL),
    Fault.LOOP: ("the chain that starts at descriptor {0} is longer than the ring", errno.EINVAL),
    Fault.INDIRECT: ("an indirect table of {0} bytes is not allowed here", errno.EINVAL),
    Fault.ORDER: ("a chain has a readable part ({0:#x}) behind a writable one", errno.EINVAL),
    Fault.ADDRESS: ("guest address {0:#x} is outside the memory the driver has shared", errno.EFAULT),
    Fault.LENGTH: ("a buffer has more bytes or pieces than a device takes ({0:#x})", errno.EINVAL),
    Fault.MEMORY: ("the memory it shared has been truncated", errno.EFAULT),
    Fault.LOG: ("guest address {0:#x} is beyond the end of the dirty log", errno.EFAULT),
    Fault.BUFFER: ("a receive buffer of {0} bytes has no room for the frame's header", errno.EINVAL),
}


class RingError(MdevError):
    """The driver broke its ring: EINVAL for what it wrote there, EFAULT for memory that is not there."""

    #: What kind of breakage.
    fault: Fault

    def __init__(self, fault: Fault, value: int, subject: object) -> None:
        sentence, number = _REASONS[fault]
        super().__init__(number, f"{subject} is broken by its driver: {sentence.format(value)}", subject)
        self.fault = fault


class VringBase(NamedTuple):
    """Where a ring goes on: the next buffer to take and to give back, with the wrap counters of a packed ring.

    Indexes of a split ring run freely over 16 bits; those of a packed ring are positions.
    """

    avail: int = 0
    used: int = 0
    avail_wrap: bool = True
    used_wrap: bool = True

    def encode(self, *, packed: bool) -> int:
        """Return the number of vhost-user's GET_VRING_BASE: for a packed ring both positions, with bit 15 as wrap counter."""
        if not packed:
            return self.avail
        return self.avail | self.avail_wrap << 15 | (self.used | self.used_wrap << 15) << 16

    @classmethod
    def decode(cls, number: int, *, packed: bool) -> VringBase:
        """Read SET_VRING_BASE. A packed ring whose upper half is 0 goes on giving back where it takes.

        DPDK's virtio_user sends only the lower half of a packed ring's base, QEMU sends both.
        """
        if not packed:
            return cls(number & 0xFFFF, number & 0xFFFF)
        low = number & 0xFFFF
        high = number >> 16 & 0xFFFF or low
        return cls(low & 0x7FFF, high & 0x7FFF, bool(low >> 15), bool(high >> 15))


class Areas(NamedTuple):
    """The three areas of a ring (2.6): descriptors, what the driver writes, what the device writes."""

    desc: Piece
    driver: Piece
    device: Piece


#: A ring from its beginning.
START: Final = VringBase()


@dataclass(frozen=True)
class RingSetup:
    """All an engine needs to run a ring. `num` and `areas` are valid: see `locate`."""

    table: MemoryTable
    areas: Areas
    num: int
    features: Feature = NO_FEATURES
    base: VringBase = START
    log: DirtyLog | None = None
    #: Whether what we write of the ring itself is logged too (VHOST_VRING_F_LOG).
    log_ring: bool = False

    @property
    def packed(self) -> bool:
        """Whether the ring is a packed one."""
        return Feature.RING_PACKED in self.features


@dataclass(frozen=True)
class MoveOptions:
    """How frames go from a transmit to a receive queue.

    `tx_header` and `rx_header` are the sizes of the virtio-net header on either side: 12 bytes with VERSION_1 or MRG_RXBUF,
    else 10 (5.1.6). `drop`: frames without a receive buffer are dropped instead of waiting. `keep_header`: flags and GSO
    fields go along with the frame; else it is delivered as one with nothing left to do.
    """

    tx_header: int = 12
    rx_header: int = 12
    mergeable: bool = False
    drop: bool = False
    keep_header: bool = False

    def __post_init__(self) -> None:
        if {self.tx_header, self.rx_header} - {10, 12} or (self.mergeable and self.rx_header == 10):
            raise ValueError(f"headers of {self.tx_header} and {self.rx_header} bytes, mergeable: {self.mergeable}")


class MoveCounters(NamedTuple):
    """What a mover has done: frames and bytes delivered, and frames lost for want of a buffer, a header, a fitting size."""

    frames: int
    bytes: int
    dropped: int
    malformed: int
    oversize: int


class Used(NamedTuple):
    """A buffer given back: its id, the bytes written into it, and its slots (as its `Chain` says)."""

    id: int
    length: int
    slots: int = 1


def area_sizes(num: int, *, packed: bool) -> tuple[int, int, int]:
    """Return the bytes of the descriptor, driver and device areas (2.7, 2.8.10), event fields included."""
    return (16 * num, 4, 4) if packed else (16 * num, 6 + 2 * num, 6 + 8 * num)


def check_size(num: int, *, packed: bool) -> None:
    """Refuse a ring size the specification does not allow: EINVAL. Only a split ring must be a power of 2 (2.7)."""
    if not 0 < num <= MAX_SIZE:
        raise MdevError(errno.EINVAL, f"a ring of {num} descriptors is not possible, {MAX_SIZE} are the most")
    if not packed and num & (num - 1):
        raise MdevError(errno.EINVAL, f"a split ring of {num} descriptors is not possible, the size must be a power of 2")


def locate(table: MemoryTable, num: int, desc: int, driver: int, device: int, *, packed: bool = False) -> Areas:
    """Find the areas of a ring in guest memory.

    EINVAL for a wrong size or alignment (2.7: 16, 2 and 4 bytes; 2.8: 16, 4 and 4), EFAULT for an area that is not wholly
    in one region.
    """
    check_size(num, packed=packed)
    found = []
    alignments = (16, 4 if packed else 2, 4)
    names = ("descriptor", "driver", "device")
    for name, address, size, alignment in zip(
        names, (desc, driver, device), area_sizes(num, packed=packed), alignments, strict=True
    ):
        piece = table.contiguous(address, size)
        if address % alignment or piece.host % alignment:
            raise MdevError(errno.EINVAL, f"the {name} area at {address:#x} is not aligned to {alignment} bytes")
        found.append(piece)
    return Areas(*found)
