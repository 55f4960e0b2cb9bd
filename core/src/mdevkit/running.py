"""Devices that run in the foreground announce themselves, so that other commands find them.

A note is a JSON file in the runtime folder that its process keeps locked; the lock ends with the process, however it ends, so a
note without a lock is stale and whoever meets it removes it. A lock belongs to a file, and another file may be at the path by
the time one has it: everybody looks, and no two listings remove a note at once. The note tells how the device began; how it is
now its process tells whoever connects to the socket beside the note, on a thread of its own: JSON, then the end of the stream.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError
from mdevkit.paths import runtime_dir
from mdevkit.sockets import listen_at, socket_identity, unlink_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Facts = Callable[[], Mapping[str, Any]]

log = logging.getLogger("mdevkit")

#: What tells a note from other files in the folder.
_UUID_LENGTH: Final = 36
#: What the socket beside a note is called; shorter than a device's own socket, whose path has to fit too.
_SOCKET: Final = ".now"
#: Seconds a process may take to tell of its device, and to end: one that stands still must not hold up everybody's listings.
_PATIENCE: Final = 1.0
#: Seconds in which those who list devices get round to letting go of a note.
_GRACE: Final = 0.5


@contextmanager
def announced(uuid: str, facts: Facts) -> Iterator[None]:
    """Tell of a device while the block runs: what `facts` returns, which is called for each who asks, on another thread.

    EEXIST when a device of that UUID runs already; errors of `listen_at` for the runtime folder.
    """
    path = runtime_dir() / f"{uuid}.json"
    with _taken(path, uuid) as note:
        try:
            # What a killed process left in it is not about this device.
            note.truncate()
            with _answering(str(path.with_suffix(_SOCKET)), facts):
                json.dump(facts(), note)
                note.flush()
                yield
        finally:
            if _is_at(path, note):
                path.unlink(missing_ok=True)


def _taken(path: Path, uuid: str) -> IO[str]:
    """Return the note at `path`, made if need be and locked; EEXIST when a device's process has it.

    Those who list devices lock a stale note too, for the moment in which they remove it, and do not tell it from one that has
    just been made.
    """
    deadline = time.monotonic() + _GRACE
    while True:
        note = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "w")
        if _locked(note.fileno(), fcntl.LOCK_EX) and _is_at(path, note):
            return note
        note.close()
        if time.monotonic() > deadline:
            raise MdevError(errno.EEXIST, f"a device {uuid} is running already", uuid)
        time.sleep(_GRACE / 50)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, note: IO[str]) -> bool:
    """Whether an open note is still the one at `path`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(note.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def _answering(path: str, facts: Facts) -> Iterator[None]:
    listener = listen_at(path)
    identity = socket_identity(path)
    ending = threading.Event()
    thread = threading.Thread(target=_answer, args=(listener, facts, ending), name="facts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        # Ends the wait for the next who asks.
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(_PATIENCE)
        unlink_socket(listener, identity, path)


def _answer(listener: socket.socket, facts: Facts, ending: threading.Event) -> None:
    while not ending.is_set():
        try:
            asker, _ = listener.accept()
        except OSError:
            # Out of descriptors, if it is not the end.
            ending.wait(_PATIENCE / 10)
            continue
        with asker:
            asker.settimeout(_PATIENCE)
            try:
                asker.sendall(json.dumps(facts()).encode())
            except Exception as error:  # noqa: BLE001  # the next who asks is to be answered, whatever becomes of this one
                log.debug("whoever asked for the device's facts got none: %s", error)


def running() -> list[dict[str, Any]]:
    """Return the facts of every device that runs, as they are now; removes stale notes.

    A device whose process does not answer has its facts of the start, and an ``error`` that says so.
    """
    notes = sorted(runtime_dir().glob(f"{'?' * _UUID_LENGTH}.json"))
    return [_ask(path, facts) for path in notes if (facts := _read(path)) is not None]


def _ask(note: Path, facts: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect(os.fsencode(note.with_suffix(_SOCKET)))
            with sock.makefile("rb") as stream:
                answer: dict[str, Any] = json.load(stream)
        except (OSError, ValueError):
            return facts | {"error": f"its process (pid {facts['pid']}) does not answer; this is how it began"}
    return answer


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open() as note:
            # Shared: those who list devices at the same time must not take each other for a device.
            if not _locked(note.fileno(), fcntl.LOCK_SH):
                facts: dict[str, Any] = json.load(note)
                return facts if _is_at(path, note) else None
            _remove(path, note)
    except (FileNotFoundError, ValueError):
        # Its process ended, or has only begun, between our looking and our reading.
        pass
    return None


def _remove(path: Path, note: IO[str]) -> None:
    """Remove a stale note that we have locked, and its socket; not if another listing is at it, or has done it."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # While the note is at its path, nobody can make another one there, and whoever wants to take this one has to wait for us.
        if _locked(folder, fcntl.LOCK_EX) and _is_at(path, note):
            path.with_suffix(_SOCKET).unlink(missing_ok=True)
            path.unlink()
    finally:
        os.close(folder)


def find(prefix: str) -> dict[str, Any]:
    """Return the facts of the running device whose UUID starts with `prefix`: ENODEV, or EINVAL when several do."""
    found = [facts for facts in running() if facts["uuid"].startswith(prefix.lower())]
    if not found:
        raise MdevError(errno.ENODEV, f"there is no running device {prefix!r}", prefix)
    if len(found) > 1:
        raise MdevError(errno.EINVAL, f"{prefix!r} is the beginning of {len(found)} devices' UUIDs", prefix)
    return found[0]
