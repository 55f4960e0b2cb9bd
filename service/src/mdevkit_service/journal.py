"""Everything that happens, over all hosts: the service's event log, on disk so that a new service goes on where the old one was.

The last events are in ``<runtime>/events.ndjson``, one line each, appended as they happen. A line tells which event of which
host it was, so that a service which finds a host again asks for what came after. On the event loop's thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("mdevkit.service")

#: Events that are kept.
CAPACITY: Final = 4096
#: Seconds between attempts to write to a disk that is full.
_RETRY: Final = 1.0

_encode: Final = msgspec.json.Encoder().encode


class Event(msgspec.Struct):
    """One event. `seq` counts without gaps, over all hosts and every service of this runtime folder."""

    seq: int
    #: add, remove, bind, unbind, change.
    action: str
    #: A device's UUID or a parent's name.
    subject: str
    #: Seconds since the epoch.
    time: float
    #: Uevent variables: MODALIAS, DRIVER, MDEV_TYPE, MDEV_PARENT, MDEV_STATE, ERROR, ...
    env: dict[str, str]


class _Line(msgspec.Struct):
    event: Event
    #: Epoch of the host, and the number the host gave the event.
    host: str = ""
    number: int = 0


class Journal:
    """The log in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        #: The events that are kept, encoded, the newest last; numbers are without gaps.
        self._ring: Final[deque[bytes]] = deque(maxlen=CAPACITY)
        self._lines: Final[deque[bytes]] = deque(maxlen=CAPACITY)
        #: Number of the newest event.
        self.last = 0
        #: Host epoch to the number of its newest event seen.
        self.seen: Final[dict[str, int]] = {}
        self._changed = asyncio.Event()
        self._closed = False
        self._file = -1
        self._written = 0
        self._retry = 0.0
        self._load()

    def _load(self) -> None:
        """Read what an earlier service has left; a last line that was cut short by its death never happened."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        for text in lines:
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.MsgspecError:
                continue
            if line.event.seq != self.last + 1:
                self._ring.clear()
                self._lines.clear()
            self._keep(line, text)
        self._rewrite()

    def _keep(self, line: _Line, text: bytes) -> None:
        self.last = line.event.seq
        if line.host:
            self.seen[line.host] = max(line.number, self.seen.get(line.host, 0))
        self._ring.append(_encode(line.event) + b"\n")
        self._lines.append(text)

    def emit(self, action: str, subject: str, env: Mapping[str, str]) -> None:
        """Add an event of the service's own."""
        self._add(_Line(Event(self.last + 1, action, subject, time.time(), dict(env))))

    def take(self, epoch: str, event: Mapping[str, Any]) -> bool:
        """Add a host's event; False when it is known already."""
        if event["seq"] <= self.seen.get(epoch, 0):
            return False
        own = Event(self.last + 1, event["action"], event["subject"], event["time"], event["env"])
        self._add(_Line(own, epoch, event["seq"]))
        return True

    def _add(self, line: _Line) -> None:
        text = _encode(line)
        self._keep(line, text)
        self._append(text)
        self._changed.set()
        self._changed = asyncio.Event()

    def _append(self, text: bytes) -> None:
        """Write a line; a disk that is full costs the events' place on it, and nothing else."""
        self._written += 1
        if self._file < 0 or self._written > 2 * CAPACITY:
            if time.monotonic() >= self._retry:
                self._rewrite()
            return
        try:
            if os.write(self._file, text + b"\n") <= len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Go on without the file for a while; then it is written anew, without the line that was cut short."""
        log.error("%s cannot be written: %s", self._path, error.strerror)
        self._retry = time.monotonic() + _RETRY
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _rewrite(self) -> None:
        """Write the file anew with what is kept, in one step."""
        temporary = self._path.with_suffix(".tmp")
        self._written = len(self._lines)
        try:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            temporary.write_bytes(b"".join(text + b"\n" for text in self._lines))
            temporary.chmod(0o600)
            temporary.rename(self._path)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Let every reader finish."""
        self._closed = True
        self._changed.set()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    async def follow(self, after: int | None = None, timeout: float | None = None) -> AsyncIterator[bytes]:
        """Yield events after `after` (the newest by default) as lines of JSON, in order, each once.

        A reader that is too slow, or asks for what is no longer kept, gets ``{"lagged": N}`` for N lost events (0: some).
        Ends when no event comes for `timeout` seconds, or the service ends.
        """
        position = self.last if after is None else after
        if position > self.last:
            yield _encode({"lagged": 0}) + b"\n"
            position = 0
        while not self._closed:
            changed = self._changed
            lost = self.last - len(self._ring) - position
            if lost > 0:
                yield _encode({"lagged": lost}) + b"\n"
                position += lost
            if position < self.last:
                batch, position = self._since(position), self.last
                yield b"".join(batch)
                continue
            try:
                await asyncio.wait_for(changed.wait(), timeout)
            except TimeoutError:
                return

    def _since(self, position: int) -> list[bytes]:
        missing = self.last - position
        return [self._ring[index] for index in range(len(self._ring) - missing, len(self._ring))]
