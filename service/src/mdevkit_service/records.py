"""Records of devices on disk: what the service knows about a device that outlives service and host.

One file per device in ``<runtime>/devices``, whose name tells where the device is in its life, so that each step is one rename:

* ``<uuid>.new``: reserved; the host is asked to create it. Nobody was told that it exists.
* ``<uuid>.json``: it exists, or shall exist again.
* ``<uuid>.gone``: the host is asked to remove it. Nobody was told that it is gone.

Called on the event loop's thread: the folder is in memory (tmpfs) wherever systemd is. Errors are `MdevError` with the path.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("mdevkit.service")


class Peer(msgspec.Struct, frozen=True):
    """Who asked: the ids of the process at the other end of a connection."""

    pid: int
    uid: int
    gid: int
    groups: list[int] = []

    @classmethod
    def ours(cls) -> Peer:
        """Return this process's own."""
        return cls(os.getpid(), os.getuid(), os.getgid(), os.getgroups())


class Record(msgspec.Struct):
    """What it takes to make the device again."""

    uuid: str
    type: str
    parent: str
    #: Create parameters, as given.
    attributes: dict[str, str] = {}
    #: Attributes its definition has stored: in order, a name as often as it was, whether they can be read or not.
    configured: list[tuple[str, str]] = []
    #: Attributes stored since, in order, as far as they can be read: what cannot is no state but an action.
    settings: dict[str, str] = {}
    bind: bool = True
    #: Bound by hand to this driver.
    driver: str | None = None
    driver_override: str | None = None
    #: Where its endpoint's socket was asked to be.
    endpoint: str | None = None
    owner: str | None = None
    #: Whose rights its paths are opened with.
    peer: Peer | None = None
    #: Sockets the service has opened for it outside its own folder: path to whose rights that was done with.
    sockets: dict[str, Peer] = {}
    #: Seconds since the epoch; devices are made again in this order.
    created: float = msgspec.field(default_factory=time.time)
    #: The machine's run in which the device was made: no device outlives that.
    boot: str = ""


class Life(StrEnum):
    """The suffix of a record's file."""

    NEW = "new"
    THERE = "json"
    GONE = "gone"


def boot_id() -> str:
    """Return what identifies this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Records:
    """The records in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        # Plain text: a path object costs as much as a system call.
        self._base: Final = str(folder)
        self._boot: Final = boot_id()

    def load(self) -> dict[str, tuple[Record, Life]]:
        """Return every record by UUID; those of an earlier boot, and what cannot be read and was never told of, are removed."""
        found: dict[str, tuple[Record, Life]] = {}
        for path in sorted(self.folder.iterdir()):
            life = next((life for life in Life if path.suffix == f".{life}"), None)
            record = self._read(path, life) if life else None
            if record and life:
                found[record.uuid] = record, life
            elif path.suffix == ".tmp":
                path.unlink(missing_ok=True)
        return dict(sorted(found.items(), key=lambda item: item[1][0].created))

    def _read(self, path: Path, life: Life) -> Record | None:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError) as error:
            if life is not Life.NEW:
                log.error("%s cannot be read: %s", path, error)
                return None
        else:
            if record.boot == self._boot and record.uuid == path.stem:
                return record
        path.unlink(missing_ok=True)
        return None

    def begin(self, record: Record) -> None:
        """Reserve a UUID for a device that is about to be made."""
        record.boot = self._boot
        self._write(self._path(record.uuid, Life.NEW), record)

    def update(self, record: Record, life: Life) -> None:
        """Store what has changed about a device, which stays where it is in its life."""
        record.boot = self._boot
        temporary = f"{self._base}/{record.uuid}.tmp"
        self._write(temporary, record)
        with _told(temporary):
            os.rename(temporary, self._path(record.uuid, life))  # noqa: PTH104

    def turn(self, uuid: str, before: Life, after: Life) -> None:
        """Take a device's next step; nothing for one whose record could not be written."""
        path = self._path(uuid, before)
        with _told(path), suppress(FileNotFoundError):
            os.rename(path, self._path(uuid, after))  # noqa: PTH104

    def drop(self, uuid: str, life: Life) -> None:
        """Forget a device."""
        path = self._path(uuid, life)
        with _told(path), suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108

    def _path(self, uuid: str, life: Life) -> str:
        return f"{self._base}/{uuid}.{life.value}"

    @staticmethod
    def _write(path: str, record: Record) -> None:
        with _told(path):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                try:
                    data = msgspec.json.encode(record)
                    if os.write(fd, data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                finally:
                    os.close(fd)
            except OSError:
                with suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
                raise


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        raise MdevError(number, f"the device's record {path} cannot be written: {error.strerror}", path) from error
