"""Errors on the wire: problem details (RFC 9457) with the errno, since users come from -EBUSY."""

from __future__ import annotations

import errno
import os
from typing import Final

from mdevkit.errors import EPROBE_DEFER, MdevError, errno_name

from mdevkit_service.schema import Problem

_STATUS: Final = {
    errno.EINVAL: 400,
    errno.ENOENT: 404,
    errno.ENODEV: 404,
    errno.EACCES: 403,
    errno.EPERM: 403,
    errno.EEXIST: 409,
    errno.EBUSY: 409,
    errno.ENOSPC: 409,
    errno.EAGAIN: 409,
    errno.ENAMETOOLONG: 400,
    errno.EOPNOTSUPP: 501,
    errno.ETIMEDOUT: 504,
}

#: Where the types of problems live; a name, not an address that answers.
_TYPES: Final = "https://mdevkit.invalid/errors/"


def problem(error: OSError) -> Problem:
    """Return what a client is told of an error."""
    number = error.errno or errno.EIO
    name = errno_name(number)
    title = "Probe deferred" if number == EPROBE_DEFER else os.strerror(number)
    detail = str(error) if isinstance(error, MdevError) else error.strerror or title
    return Problem(f"{_TYPES}{name.replace(' ', '-')}", title, _STATUS.get(number, 500), detail, name)
