"""Ethernet addresses of network devices: the attribute ``mac`` of every parent that has one.

Loaded to list types, so it is small.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from mdevkit.attributes import Kind

if TYPE_CHECKING:
    from uuid import UUID

_ADDRESS: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Mac(Kind[str]):
    """A unicast Ethernet address, six bytes in hexadecimal with colons; the empty text stands for one made from the UUID."""

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        lowered = text.lower()
        if not lowered:
            return ""
        if not _ADDRESS.fullmatch(lowered):
            raise ValueError(f"an address such as 02:00:00:00:00:01 is wanted, not {text[:40]!r}")
        if int(lowered[:2], 16) & 1 or lowered == "00:00:00:00:00:00":
            raise ValueError(f"the address of one card is wanted, not {text!r}")
        return lowered


def mac_bytes(text: str, uuid: UUID) -> bytes:
    """Return the address a `Mac` has let through.

    Of the empty text it is a locally administered one that belongs to the UUID: a device that is defined keeps it.
    """
    return bytes.fromhex(text.replace(":", "")) if text else b"\x02" + sha256(uuid.bytes).digest()[:5]
