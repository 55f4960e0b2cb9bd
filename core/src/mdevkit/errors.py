"""The one exception type of mdevkit, and the errnos that have a meaning of their own here.

Every failure a caller can see is an `MdevError`: an `OSError` with an errno, so that it maps onto sysfs, vfio-user and
exit codes unchanged, plus the object it is about and a sentence a person can act on. Any thread may raise or read one.

Commands that only ask a running service import this module: it imports nothing that takes time.
"""

from __future__ import annotations

import errno as _errno

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

#: Probe asks to be called again after another driver has bound (include/linux/errno.h); not a failure.
EPROBE_DEFER = 517

#: errno to name; where Linux has two names for one number, the one the kernel's sources use.
_NAMES = {
    **_errno.errorcode,
    _errno.EDEADLK: "EDEADLK",
    _errno.EOPNOTSUPP: "EOPNOTSUPP",
    EPROBE_DEFER: "EPROBE_DEFER",
}


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
    return _NAMES.get(number or 0, f"errno {number}")


def wrap(error: BaseException, doing: str, subject: Any = None) -> MdevError:
    """Turn whatever a plugin raised while `doing` something into an `MdevError` with the same errno and reason.

    An `MdevError` comes back as it is. An `OSError` keeps its errno. Anything else is a bug of the plugin: EIO, and the
    sentence names the exception. See `Guard` for how to use it.
    """
    if isinstance(error, MdevError):
        if error.subject is None:
            error.subject = subject
        return error
    if isinstance(error, OSError) and error.errno:
        wrapped = MdevError(error.errno, f"{doing}: {error.strerror}{_file_of(error)}", subject)
    else:
        wrapped = MdevError(_errno.EIO, f"{doing}: {describe(error)}", subject)
    wrapped.__cause__ = error
    return wrapped


class Guard:
    """A block that runs code of a plugin: what it raises leaves the block as `wrap` makes it.

    SystemExit, asyncio's CancelledError and their like are the plugin's bug as any other exception is; only KeyboardInterrupt is
    the user's wish and passes.
    """

    def __init__(self, doing: str, subject: Any = None) -> None:
        self._doing = doing
        self._subject = subject

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, MdevError):
            wrap(error, self._doing, self._subject)  # gives it a subject; raised "from" itself it would be its own cause
        elif error is not None and not isinstance(error, KeyboardInterrupt):
            raise wrap(error, self._doing, self._subject) from error


def describe(error: BaseException) -> str:
    """Return the exception's type and reason on one line."""
    try:
        reason = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  (an exception of a plugin's making that cannot even say what it is about)
        reason = ""
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def brief(error: MdevError) -> MdevError:
    """Return what `error` says, without its traceback: that would keep alive whatever the failed call had in hand."""
    return MdevError(error.errno or _errno.EIO, str(error), error.subject)


def shown(value: object) -> str:
    """Return the repr of a value somebody gave us, cut short: a wrong value may be megabytes long."""
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _file_of(error: OSError) -> str:
    return f": {error.filename}" if error.filename is not None else ""
