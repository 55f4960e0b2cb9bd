"""A listening UNIX socket at a path: taking the path, and giving it back. Any thread may call in, one at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError, wrap

#: Length of sun_path without its NUL (unix(7)).
MAX_PATH: Final = 107
#: Who may connect: the owner.
MODE: Final = 0o600
_BACKLOG: Final = 512
#: Seconds in which somebody who has bound a path gets round to listening on it.
_GRACE: Final = 0.05


class Listener:
    """Listens at `path` from the constructor to `close`."""

    def __init__(self, path: Path) -> None:
        _check(path)
        self.path: Final = path
        self.sock: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mode of the socket before it has a name is the mode of the file: nobody gets in before a chmod.
            os.fchmod(self.sock.fileno(), MODE)
            self._bind()
            self.sock.setblocking(False)
            self.sock.listen(_BACKLOG)
            self._identity = _identity(path)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        """Remove the file, unless the path is somebody else's by now, and stop listening."""
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                self.path.unlink()
        self.sock.close()

    def _bind(self) -> None:
        try:
            if not self._try_bind():
                self._replace()
        except OSError as error:
            raise wrap(error, f"cannot listen at {self.path}", self.path) from error

    def _try_bind(self) -> bool:
        try:
            self.sock.bind(os.fsencode(self.path))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True

    def _replace(self) -> None:
        """Take a path whose socket nobody listens on any more; EADDRINUSE if somebody does, or if it is no socket."""
        with _locked(self.path.parent):
            _check_stale(self.path)
            self.path.unlink(missing_ok=True)
            if not self._try_bind():
                raise _taken(self.path, "another server listens there")


def _check(path: Path) -> None:
    """Refuse a path that cannot be bound, with a sentence that says which part of it is wrong."""
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise MdevError(errno.ENAMETOOLONG, f"{path} has {length} bytes, a socket's path may have {MAX_PATH}", path)
    folder = path.parent
    if not folder.exists():
        raise MdevError(errno.ENOENT, f"the folder {folder} does not exist", path)
    if not folder.is_dir():
        raise MdevError(errno.ENOTDIR, f"{folder} is not a folder", path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MdevError(errno.EACCES, f"the folder {folder} is not writable", path)


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other servers from replacing a socket in `folder` at the same time: both would find it dead."""
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


def _check_stale(path: Path) -> None:
    """Refuse `path` unless it is a socket nobody listens on, and goes on being that, or nothing any more."""
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise _taken(path, "something that is no socket is there")
            if not _refused(path):
                raise _taken(path, "another server listens there")
        # Somebody may have bound the path a moment ago and be about to listen.
        time.sleep(_GRACE / 5)


def _taken(path: Path, why: str) -> MdevError:
    return MdevError(errno.EADDRINUSE, f"{path} is taken: {why}", path)


def _refused(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
