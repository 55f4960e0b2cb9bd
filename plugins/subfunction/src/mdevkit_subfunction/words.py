"""The words of devlink's ``port`` commands, as the command line and the parent's attributes take them: name and value in turn.

Text in, checked values out; no state, any thread.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final
from uuid import UUID

from mdevkit.errors import MdevError, shown

from mdevkit_subfunction.eswitch import FLAVOURS

#: What `port add` takes.
PORT: Final = ("flavour", "name", "uuid", "pfnum", "sfnum")
#: devlink's word for a sub-function of the vendor's own driver.
_ALIASES: Final = {"pcisf": "mlx5"}
#: Patterns of a network interface's name and of an Ethernet address.
NETDEV: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}"
ADDRESS: Final = r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"


def pairs(words: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Return name and value of each pair of words; EINVAL for one that is unknown, given twice, or without a value."""
    found: dict[str, str] = {}
    for name, value in _in_twos(words):
        if name not in known:
            raise MdevError(errno.EINVAL, f"{shown(name)} is none of {', '.join(known)}")
        if name in found:
            raise MdevError(errno.EINVAL, f"{name} is given twice")
        if not value:
            raise MdevError(errno.EINVAL, f"{name} needs a value")
        found[name] = value
    return found


def _in_twos(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place in range(0, len(words), 2):
        yield words[place], words[place + 1] if place + 1 < len(words) else ""


def flavour(text: str) -> str:
    """Return the flavour a word means: EINVAL."""
    meant = _ALIASES.get(text, text)
    if meant not in FLAVOURS:
        raise MdevError(errno.EINVAL, f"flavour {shown(text)} is none of {', '.join(FLAVOURS)}")
    return meant


def number(name: str, text: str) -> int:
    """Return a number: EINVAL."""
    try:
        return int(text, 0)
    except ValueError:
        raise MdevError(errno.EINVAL, f"{name} wants a number, not {shown(text)}") from None


def address(text: str) -> bytes:
    """Return an Ethernet address: EINVAL."""
    if not re.fullmatch(ADDRESS, text):
        raise MdevError(errno.EINVAL, f"hw_addr wants an address like 02:00:00:00:00:01, not {shown(text)}")
    return bytes.fromhex(text.replace(":", ""))


def netdev(text: str) -> str:
    """Return a network interface's name: EINVAL."""
    if not re.fullmatch(NETDEV, text):
        raise MdevError(errno.EINVAL, f"name {shown(text)} is not that of a network interface (15 letters, digits, _, . or -)")
    return text


def uuid(text: str) -> str:
    """Return a UUID in its usual form: EINVAL."""
    try:
        return str(UUID(text))
    except ValueError:
        raise MdevError(errno.EINVAL, f"{shown(text)} is not a UUID") from None
