"""Devices that run in the foreground announce themselves, so that other commands find them.

A note is a JSON file in the runtime folder that its process keeps locked; the lock ends with the process, however it ends, so a
note without a lock is stale and whoever meets it removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError
from mdevkit.paths import runtime_dir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


#: What tells a note from other files in the folder.
_UUID_LENGTH: Final = 36


@contextmanager
def announced(uuid: str, facts: Mapping[str, Any]) -> Iterator[None]:
    """Keep a note about a device while the block runs; EEXIST when a device of that UUID runs already."""
    path = runtime_dir() / f"{uuid}.json"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MdevError(errno.EEXIST, f"a device {uuid} is running already", uuid) from None
        try:
            note.truncate()
            json.dump(facts, note)
            note.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def running() -> list[dict[str, Any]]:
    """Return the facts of every device that runs; removes stale notes."""
    return [facts for path in sorted(runtime_dir().glob(f"{'?' * _UUID_LENGTH}.json")) if (facts := _read(path)) is not None]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open() as note:
            try:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                facts: dict[str, Any] = json.load(note)
                return facts
            path.unlink(missing_ok=True)
    except (FileNotFoundError, ValueError):
        # Its process ended, or has only begun, between our looking and our reading.
        pass
    return None


def find(prefix: str) -> dict[str, Any]:
    """Return the facts of the running device whose UUID starts with `prefix`: ENODEV, or EINVAL when several do."""
    found = [facts for facts in running() if facts["uuid"].startswith(prefix.lower())]
    if not found:
        raise MdevError(errno.ENODEV, f"there is no running device {prefix!r}", prefix)
    if len(found) > 1:
        raise MdevError(errno.EINVAL, f"{prefix!r} is the beginning of {len(found)} devices' UUIDs", prefix)
    return found[0]
