"""Names people type: UUIDs."""

from __future__ import annotations

import errno
import re
from uuid import UUID

from mdevkit.errors import MdevError, shown

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def parse_uuid(text: UUID | str) -> UUID:
    """Return the UUID of `text`, which must be of the form 8-4-4-4-12 hex digits in either case: EINVAL otherwise."""
    if isinstance(text, UUID):
        return text
    if not isinstance(text, str) or not _UUID.fullmatch(text):
        raise MdevError(errno.EINVAL, f"{shown(text)} is not a UUID (8-4-4-4-12 hex digits)", text)
    return UUID(text)
