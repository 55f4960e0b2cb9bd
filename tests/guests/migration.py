"""Moves a running guest from one QEMU to another, and compares the memory of both. For the guests' thread."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tests.guests.guest import Guest, GuestError

PAGE = 4096


def migrate(source: Guest, destination: Guest, folder: Path) -> None:
    """Move the guest; neither of the two runs then.

    `destination` was made with ``incoming``; `folder` is for a socket between them. GuestError with QEMU's sentence if it fails.
    """
    uri = f"unix:{folder / 'migration'}"
    destination.qmp.execute("migrate-incoming", uri=uri)
    source.qmp.execute("migrate", uri=uri)
    for end in (source, destination):
        _wait(end, "completed")


def cancel_migration(source: Guest, folder: Path) -> None:
    """Begin to move the guest to nobody, and think better of it: it goes on where it is."""
    path = folder / "nobody"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        source.qmp.execute("migrate", uri=f"unix:{path}")
        _wait(source, "active")
        source.qmp.execute("migrate_cancel")
        _wait(source, "cancelled")


def _wait(guest: Guest, status: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while (info := guest.qmp.execute("query-migrate")).get("status") != status:
        if info.get("status") in {"failed", "cancelled", "completed"} or time.monotonic() > deadline:
            raise GuestError(f"the migration is not {status}: {info}")
        time.sleep(0.02)  # QEMU has an event for it as an option only, and it is not what is tested here


def differing_pages(one: Guest, other: Guest) -> list[int]:
    """Return the numbers of the pages in which the memory of two guests differs; both must be at rest."""
    with one.memory.open("rb", buffering=0) as first, other.memory.open("rb", buffering=0) as second:
        size = os.fstat(first.fileno()).st_size
        assert os.fstat(second.fileno()).st_size == size
        return [page for start in range(0, size, 256 * PAGE) for page in _differing(first.fileno(), second.fileno(), start)]


def _differing(first: int, second: int, start: int) -> list[int]:
    one, other = (os.pread(file, 256 * PAGE, start) for file in (first, second))
    if one == other:
        return []
    pages = range(0, len(one), PAGE)
    return [(start + page) // PAGE for page in pages if one[page : page + PAGE] != other[page : page + PAGE]]
