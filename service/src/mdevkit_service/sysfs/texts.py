"""What a program writes into a file of sysfs, read as the kernel reads it. Pure functions; every error is EINVAL."""

from __future__ import annotations

import errno
import re
from typing import Final

from mdevkit.errors import MdevError, shown
from mdevkit.names import parse_uuid

#: The most one write(2) hands to a store method, and the size every attribute claims to have (fs/kernfs/file.c, fs/sysfs/file.c).
PAGE: Final = 4096

#: A device's name.
UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: What kstrtoul takes with base 0 (lib/kstrtox.c): no blanks, no sign but a plus, one newline.
_UNSIGNED: Final = re.compile(r"\+?(?:0[xX](?P<hex>[0-9A-Fa-f]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*))\n?")
_UUID_LENGTH: Final = 36


def line(data: bytes) -> str:
    """Return one line of text without its newline."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise MdevError(errno.EINVAL, f"{shown(data)} is not text") from None
    return text.removesuffix("\n")


def uuid(data: bytes) -> str:
    """Return the UUID somebody writes to ``create``: 36 characters and at most a newline (or a C string's end) after them."""
    if len(data) not in {_UUID_LENGTH, _UUID_LENGTH + 1} or data[_UUID_LENGTH:] not in {b"", b"\n", b"\0"}:
        raise MdevError(errno.EINVAL, f"{shown(data)} is not a UUID and nothing else")
    return str(parse_uuid(line(data[:_UUID_LENGTH])))


def unsigned(data: bytes) -> int:
    """Return a number of 64 bits, whose base its prefix tells."""
    found = _UNSIGNED.fullmatch(data.decode("latin-1"))
    if found is None:
        raise MdevError(errno.EINVAL, f"{shown(data)} is not a number")
    value = int(found["hex"], 16) if found["hex"] else int(found["octal"], 8) if found["octal"] else int(found["decimal"])
    if value >= 1 << 64:
        raise MdevError(errno.EINVAL, f"{shown(data)} has more than 64 bits")
    return value


def flag(data: bytes) -> bool:
    """Return a yes or no as kstrtobool takes it: its first character tells, or ``on`` and ``off``."""
    text = line(data).lower()
    if text[:1] in {"y", "t", "1"} or text[:2] == "on":
        return True
    if text[:1] in {"n", "f", "0"} or text[:2] == "of":
        return False
    raise MdevError(errno.EINVAL, f"{shown(data)} is neither yes nor no")
