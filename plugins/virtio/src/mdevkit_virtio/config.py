"""The device-specific configuration space (virtio 1.2, section 2.5): fields, widths, and the generation, done once.

A vendor states fields and sets values by name; drivers read and write bytes. Every method may be called by any thread: each
takes the space's own lock, which is held for a copy of some bytes only.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mdevkit.errors import MdevError

_U32: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Field:
    """One field: a little-endian number of 1, 2, 4 or 8 bytes, or an array of bytes of any `size` (a MAC address).

    `writable`: a driver may write it.
    """

    name: str
    offset: int
    size: int
    writable: bool = False

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.size


class ConfigSpace:
    """Fields and what is in them, 0 at first. ValueError for a layout that cannot be: overlaps, names used twice.

    `size` in bytes, by default up to the last field's end. Bytes between fields are 0 and read-only.
    """

    def __init__(self, fields: Sequence[Field] = (), size: int | None = None) -> None:
        self._fields: Final = {field.name: field for field in fields}
        self.size: Final = max((field.end for field in fields), default=0) if size is None else size
        self._bytes: Final = bytearray(self.size)
        self._generation = 0
        self._lock: Final = threading.Lock()
        _check_layout(fields, self.size)
        #: One byte for each: 1 where a driver may write.
        self._writable: Final = bytearray(self.size)
        for field in fields:
            self._writable[field.offset : field.end] = bytes([field.writable]) * field.size

    @property
    def generation(self) -> int:
        """A number that is another one after each change (u32)."""
        return self._generation

    def advance(self) -> None:
        """Make the generation another one without a change, as a reset does."""
        with self._lock:
            self._generation = (self._generation + 1) & _U32

    # -- for the vendor ----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> int:
        """Return a field as a number, also an array of bytes; KeyError for one that is not there."""
        return int.from_bytes(self.get_bytes(name), "little")

    def get_bytes(self, name: str) -> bytes:
        """Return the bytes of a field."""
        field = self._fields[name]
        with self._lock:
            return bytes(self._bytes[field.offset : field.end])

    def update(self, **values: int | bytes) -> bool:
        """Set fields, all in one: no driver sees some without the others. True if anything has changed.

        One change is one step of the generation. OverflowError for a number that does not fit, ValueError for bytes that do not.
        """
        changes = [(self._fields[name], self._encode(self._fields[name], value)) for name, value in values.items()]
        with self._lock:
            before = bytes(self._bytes)
            for field, data in changes:
                self._bytes[field.offset : field.end] = data
            return self._changed_from(before)

    @staticmethod
    def _encode(field: Field, value: int | bytes) -> bytes:
        data = value if isinstance(value, bytes) else value.to_bytes(field.size, "little")
        if len(data) != field.size:
            raise ValueError(f"field {field.name} has {field.size} bytes, not {len(data)}")
        return data

    def _changed_from(self, before: bytes) -> bool:
        if self._bytes == before:
            return False
        self._generation = (self._generation + 1) & _U32
        return True

    # -- for the driver ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, of one moment: EINVAL for a range that is empty or not wholly inside."""
        self._check_range(offset, length)
        with self._lock:
            return bytes(self._bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> bool:
        """Write bytes: EINVAL as `read`, EACCES if one of them is not a driver's to write. True if anything has changed."""
        self._check_range(offset, len(data))
        if not all(self._writable[offset : offset + len(data)]):
            raise MdevError(errno.EACCES, f"{len(data)} bytes at {offset} of the configuration space are read-only")
        with self._lock:
            before = bytes(self._bytes)
            self._bytes[offset : offset + len(data)] = data
            return self._changed_from(before)

    def _check_range(self, offset: int, length: int) -> None:
        if length <= 0 or offset < 0 or offset + length > self.size:
            raise MdevError(errno.EINVAL, f"{length} bytes at {offset} are not in the configuration space of {self.size} bytes")


def _check_layout(fields: Sequence[Field], size: int) -> None:
    if len({field.name for field in fields}) != len(fields):
        raise ValueError("a field is stated twice")
    end = 0
    for field in sorted(fields, key=lambda field: field.offset):
        if field.size < 1 or field.offset < end or field.end > size:
            raise ValueError(f"field {field.name} overlaps another one, or the end of the {size} bytes")
        end = field.end
