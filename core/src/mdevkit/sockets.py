"""Listening UNIX sockets at a path somebody asked for: how devices and drivers get theirs.

A device must not open a path with more rights than whoever named it has, so parents and drivers do not bind paths
themselves: they call ``mdev.listen(path)``. In a process of the user's own that is `listen_at`; a host process of root's
service has the service open it on his behalf. Any thread may call.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError

#: Makes the socket that listens at a path.
Listen = Callable[[str], socket.socket]

#: Length in bytes of sun_path without its NUL (unix(7)).
MAX_PATH: Final = 107
#: Connections that may wait to be accepted: a crowd must not keep out whoever comes next.
_BACKLOG: Final = 512
#: Seconds in which somebody who has bound a path gets round to listening on it.
_GRACE: Final = 0.05
_NO_SOCKET: Final = (0, 0)


def listen_at(path: str, mode: int = 0o600) -> socket.socket:
    """Return a stream socket that listens at `path`, whose file has `mode` from the first moment.

    A socket nobody listens on any more is replaced. ENAMETOOLONG, ENOENT, ENOTDIR, EACCES, or EADDRINUSE when somebody
    listens there or it is no socket; each says what is wrong with the path.
    """
    _check(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode of the socket before it has a name is the mode of the file: nobody gets in before a chmod.
        os.fchmod(listener.fileno(), mode)
        if not _bound(listener, path):
            _replace(listener, path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(path, error) from error
    return listener


def unlink_socket(listener: socket.socket, identity: tuple[int, int], path: str) -> None:
    """Close a listener and remove its file, unless another file has taken that name since `identity` was read.

    A file that is not ours to remove stays: whoever has made the socket for us removes it.
    """
    if socket_identity(path) == identity != _NO_SOCKET:
        with suppress(OSError):
            Path(path).unlink()
    listener.close()


def socket_identity(path: str) -> tuple[int, int]:
    """Return device and inode of the socket at `path`; zeros when there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return _NO_SOCKET
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else _NO_SOCKET


def is_stale(path: str) -> bool:
    """Whether `path` is a socket nobody listens on, and goes on being that for a moment."""
    deadline = time.monotonic() + _GRACE
    while socket_identity(path) != _NO_SOCKET:
        if not _refuses(path):
            return False
        if time.monotonic() > deadline:
            return True
        # Somebody may have bound the path a moment ago and be about to listen.
        time.sleep(_GRACE / 5)
    return not os.path.lexists(path)


def _refuses(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _bound(listener: socket.socket, path: str) -> bool:
    try:
        listener.bind(os.fsencode(path))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise
    return True


def _replace(listener: socket.socket, path: str) -> None:
    """Take a path whose socket is stale; EADDRINUSE if it is not."""
    with _locked(Path(path).parent):
        if is_stale(path):
            Path(path).unlink(missing_ok=True)
            if _bound(listener, path):
                return
    other = socket_identity(path) == _NO_SOCKET and os.path.lexists(path)
    why = "something that is no socket is there" if other else "another server listens there"
    raise MdevError(errno.EADDRINUSE, f"{path} is taken: {why}", path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others from replacing a socket in `folder` at the same time: both would find it dead."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + 1
        while not _try_lock(fd) and time.monotonic() < deadline:
            # Whoever holds it is between two system calls; a stranger who holds it for good must not stop us.
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check(path: str) -> None:
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise MdevError(errno.ENAMETOOLONG, f"{path} has {length} bytes, a socket's path may have {MAX_PATH}", path)


def _refused(path: str, error: OSError) -> MdevError:
    """Say which part of the path is wrong."""
    if isinstance(error, MdevError):
        return error
    folder = Path(path).parent
    reasons = {
        errno.ENOENT: f"the folder {folder} does not exist",
        errno.ENOTDIR: f"{folder} is not a folder",
        errno.EACCES: f"no permission to make files in {folder}",
    }
    reason = reasons.get(error.errno or 0, error.strerror)
    return MdevError(error.errno or errno.EIO, f"cannot listen at {path}: {reason}", path)
