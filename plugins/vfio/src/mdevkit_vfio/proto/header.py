"""Commands, limits and the 16-byte header that every vfio-user message begins with; checks the payload modules share."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import Final, NamedTuple

from mdevkit.errors import MdevError

Buffer = bytes | bytearray | memoryview


class Command(IntEnum):
    """``VFIO_USER_*`` message numbers; 14 (DIRTY_PAGES) was withdrawn."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


def command_name(number: int) -> str:
    """Return a command's name for messages; unknown numbers come back as ``command N``."""
    try:
        return Command(number).name
    except ValueError:
        return f"command {number}"


#: The version we speak. A reply carries the client's minor where that is lower (QEMU 11 proposes 0.0 and takes no other).
MAJOR: Final = 0
MINOR: Final = 2

#: Bits of the header's flags: four bits of type, then options.
TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0
TYPE_REPLY: Final = 1
NO_REPLY: Final = 0x10
ERROR: Final = 0x20

#: The most data one message moves, in bytes, unless the peer asks for less.
MAX_DATA_XFER_SIZE: Final = 1 << 20
#: Descriptors one message may carry; QEMU and cloud-hypervisor send at most 16.
MAX_MSG_FDS: Final = 16
#: A peer may claim to take this many; more is a mistake.
MAX_PEER_MSG_FDS: Final = 1024
#: Ranges of guest memory one client may map.
MAX_DMA_MAPS: Final = 1024
#: Page sizes of DMA maps, or-ed together.
PAGE_SIZE: Final = 4096

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1

#: message id, command, message size, flags, errno
HEADER: Final = struct.Struct("=HHIII")
HEADER_SIZE: Final = HEADER.size
#: The largest message: header, the fixed part of an access, data.
MAX_MESSAGE_SIZE: Final = HEADER_SIZE + 16 + MAX_DATA_XFER_SIZE


def invalid(command: Command, text: str) -> MdevError:
    """Return the EINVAL that refuses a message, with a sentence that starts with the command."""
    return MdevError(errno.EINVAL, f"{command.name}: {text}")


def fixed(command: Command, payload: Buffer, size: int) -> None:
    """Refuse a payload that does not have exactly `size` bytes."""
    if len(payload) != size:
        raise invalid(command, f"the payload has {len(payload)} bytes, not {size}")


def at_least(command: Command, payload: Buffer, size: int) -> None:
    """Refuse a payload of fewer than `size` bytes; where it is followed by room for the reply, more is right."""
    if len(payload) < size:
        raise invalid(command, f"the payload has {len(payload)} bytes, {size} are needed")


def check_argsz(command: Command, argsz: int, least: int, most: int = U32_MAX) -> None:
    """Refuse an argsz outside `least` to `most`."""
    if not least <= argsz <= most:
        raise invalid(command, f"argsz {argsz} is outside {least} to {most}")


class Header(NamedTuple):
    """The 16 bytes every message begins with; `size` counts them."""

    id: int
    command: int
    size: int
    flags: int = TYPE_COMMAND
    error: int = 0


def message(ident: int, command: int, payload: Buffer = b"", flags: int = TYPE_COMMAND) -> bytes:
    """Return a whole message: header and `payload`."""
    return HEADER.pack(ident, command, HEADER_SIZE + len(payload), flags, 0) + payload


def reply_head(ident: int, command: int, size: int) -> bytes:
    """Return the header of the successful reply to message `ident`, which has a payload of `size` bytes."""
    return HEADER.pack(ident, command, HEADER_SIZE + size, TYPE_REPLY, 0)


def reply(ident: int, command: int, payload: Buffer = b"") -> bytes:
    """Return the successful reply to message `ident`."""
    return reply_head(ident, command, len(payload)) + payload


def error_reply(ident: int, command: int, number: int) -> bytes:
    """Return the reply that refuses message `ident` with errno `number`: a header and nothing else."""
    return HEADER.pack(ident, command, HEADER_SIZE, TYPE_REPLY | ERROR, number)
