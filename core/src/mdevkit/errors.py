"""The one exception type of mdevkit, and the errnos that have a meaning of their own here.

Every failure a caller can see is an `MdevError`: an `OSError` with an errno, so that it maps onto sysfs, vfio-user and
exit codes unchanged, plus the object it is about and a sentence a person can act on. Any thread may raise or read one.
"""

from __future__ import annotations

import errno as _errno
from typing import Any

#: Probe asks to be called again after another driver has bound (include/linux/errno.h); not a failure.
EPROBE_DEFER = 517


class MdevError(OSError):
    """A failed operation.

    `errno` says what kind of failure, `strerror` is one sentence without a trailing newline, `subject` is the object the
    failure is about (a device, a parent, a plugin, a path, or None).
    """

    #: The object the error is about.
    subject: Any

    def __init__(self, errno: int, message: str, subject: Any = None) -> None:
        super().__init__(errno, message)
        self.subject = subject

    def __str__(self) -> str:
        return self.strerror or errno_name(self.errno)

    @property
    def name(self) -> str:
        """The symbolic errno, e.g. ``ENOSPC``."""
        return errno_name(self.errno)


class ProbeDeferredError(MdevError):
    """Raised by a driver's probe: what it depends on is not there yet; try again after the next successful bind."""

    def __init__(self, message: str, subject: Any = None) -> None:
        super().__init__(EPROBE_DEFER, message, subject)


def errno_name(number: int | None) -> str:
    """Return the symbolic name of an errno; unknown numbers come back as ``errno N``."""
    if number == EPROBE_DEFER:
        return "EPROBE_DEFER"
    return _errno.errorcode.get(number or 0, f"errno {number}")


def wrap(error: BaseException, doing: str, subject: Any = None) -> MdevError:
    """Turn whatever a plugin raised while `doing` something into an `MdevError` with the same errno and reason.

    An `MdevError` comes back as it is. An `OSError` keeps its errno. Anything else is a bug of the plugin: EIO, and the
    sentence names the exception.
    """
    if isinstance(error, MdevError):
        if error.subject is None:
            error.subject = subject
        return error
    if isinstance(error, OSError) and error.errno:
        wrapped = MdevError(error.errno, f"{doing}: {error.strerror}{_file_of(error)}", subject)
    else:
        wrapped = MdevError(_errno.EIO, f"{doing}: {type(error).__name__}: {error}".rstrip(": "), subject)
    wrapped.__cause__ = error
    return wrapped


def _file_of(error: OSError) -> str:
    return f": {error.filename}" if error.filename is not None else ""
