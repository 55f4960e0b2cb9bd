"""DEVICE_FEATURE and the migration stream: MIG_DATA_READ and MIG_DATA_WRITE."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from mdevkit_vfio.proto.header import Buffer, Command, at_least, check_argsz, fixed, invalid
from mdevkit_vfio.uapi import FEATURE_GET, FEATURE_MASK, FEATURE_PROBE, FEATURE_SET

_FEATURE = struct.Struct("=II")
_MIG_DATA = struct.Struct("=II")
_MIG_STATE = struct.Struct("=Ii")
_U64 = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """DEVICE_FEATURE: feature number and GET, SET, PROBE bits in `flags`; `argsz` limits the reply."""

    argsz: int
    flags: int
    data: bytes = b""

    @property
    def number(self) -> int:
        """The feature (``VFIO_DEVICE_FEATURE_*``)."""
        return self.flags & FEATURE_MASK

    def pack(self) -> bytes:
        """Return the payload, of the request and of the reply."""
        return _FEATURE.pack(self.argsz, self.flags) + self.data

    @classmethod
    def parse(cls, payload: Buffer) -> FeatureRequest:
        """Read the payload; GET and SET exclude each other unless PROBE asks for both, one of the three must be there."""
        at_least(Command.DEVICE_FEATURE, payload, _FEATURE.size)
        argsz, flags = _FEATURE.unpack_from(payload)
        check_argsz(Command.DEVICE_FEATURE, argsz, _FEATURE.size)
        asked = flags & (FEATURE_GET | FEATURE_SET)
        if flags & ~(FEATURE_MASK | FEATURE_GET | FEATURE_SET | FEATURE_PROBE):
            raise invalid(Command.DEVICE_FEATURE, f"flags {flags:#x} are unknown")
        if not flags & FEATURE_PROBE and asked not in (FEATURE_GET, FEATURE_SET):
            raise invalid(Command.DEVICE_FEATURE, f"flags {flags:#x} ask for neither GET nor SET, or for both")
        return cls(argsz, flags, bytes(payload[_FEATURE.size :]))

    def check(self, supported: int, needed: int) -> None:
        """Refuse what the feature cannot do, and an argsz without room for its `needed` bytes of data (vfio_check_feature)."""
        if self.flags & (FEATURE_GET | FEATURE_SET) & ~supported:
            raise invalid(Command.DEVICE_FEATURE, f"feature {self.number} does not do flags {self.flags:#x}")
        if self.flags & FEATURE_PROBE:
            return
        check_argsz(Command.DEVICE_FEATURE, self.argsz, _FEATURE.size + needed)
        if self.flags & FEATURE_SET and len(self.data) < needed:
            raise invalid(Command.DEVICE_FEATURE, f"{len(self.data)} bytes of data, {needed} are needed")

    def answer(self, data: bytes) -> bytes:
        """Return the reply to a GET."""
        return _FEATURE.pack(_FEATURE.size + len(data), self.flags) + data


#: An argsz that every feature's data fits.
FEATURE_ROOM: Final = _FEATURE.size + 64
MIG_STATE_SIZE: Final = _MIG_STATE.size
U64_SIZE: Final = _U64.size


def pack_mig_state(state: int) -> bytes:
    """Return the data of feature MIG_DEVICE_STATE; vfio-user has no data descriptor, so data_fd is -1."""
    return _MIG_STATE.pack(state, -1)


def parse_mig_state(data: Buffer) -> int:
    """Read the data of feature MIG_DEVICE_STATE: the state's number."""
    at_least(Command.DEVICE_FEATURE, data, _MIG_STATE.size)
    state: int = _MIG_STATE.unpack_from(data)[0]
    return state


def pack_u64(value: int) -> bytes:
    """Return the data of features MIGRATION (flags) and MIG_DATA_SIZE (bytes)."""
    return _U64.pack(value)


def parse_u64(data: Buffer) -> int:
    """Read the data of features MIGRATION and MIG_DATA_SIZE."""
    at_least(Command.DEVICE_FEATURE, data, _U64.size)
    value: int = _U64.unpack_from(data)[0]
    return value


def pack_mig_data(size: int, data: Buffer = b"") -> bytes:
    """Return the payload of MIG_DATA_READ (no data), of its reply, and of MIG_DATA_WRITE."""
    return _MIG_DATA.pack(_MIG_DATA.size + size, size) + data


def parse_mig_read(payload: Buffer, most: int) -> int:
    """Read the payload of MIG_DATA_READ: how many bytes are wanted, up to `most`."""
    at_least(Command.MIG_DATA_READ, payload, _MIG_DATA.size)
    argsz, size = _MIG_DATA.unpack_from(payload)
    if size > most:
        raise invalid(Command.MIG_DATA_READ, f"size {size} exceeds the {most} bytes of one message")
    check_argsz(Command.MIG_DATA_READ, argsz, _MIG_DATA.size + size)
    return int(size)


def parse_mig_data(command: Command, payload: Buffer, most: int) -> bytes:
    """Read the payload of MIG_DATA_WRITE or of the reply to MIG_DATA_READ: `size` bytes, up to `most`."""
    at_least(command, payload, _MIG_DATA.size)
    argsz, size = _MIG_DATA.unpack_from(payload)
    if size > most:
        raise invalid(command, f"size {size} exceeds the {most} bytes of one message")
    check_argsz(command, argsz, _MIG_DATA.size)
    fixed(command, payload, _MIG_DATA.size + size)
    return bytes(payload[_MIG_DATA.size :])
