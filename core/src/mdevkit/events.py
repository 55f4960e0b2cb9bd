"""What happens in a registry, in order: the uevents of the driver core with a sequence number.

Emitting costs the same for any number of subscribers: events go into one ring, and each subscriber keeps a position in it.
A subscriber that is too slow is told how many events it missed instead of holding anybody up. Any thread may emit,
subscribe or read; an emitter never waits for a reader.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from mdevkit.errors import MdevError


class Action(StrEnum):
    """What happened, as in a Linux uevent."""

    ADD = "add"
    REMOVE = "remove"
    BIND = "bind"
    UNBIND = "unbind"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `seq` counts from 1 without gaps over the registry; `subject` is a parent's name or a device's name."""

    seq: int
    action: Action
    subject: str
    #: Seconds since the epoch.
    time: float
    #: Uevent variables: MODALIAS, DRIVER, MDEV_TYPE, MDEV_STATE, ERROR, ...
    env: Mapping[str, str] = field(default_factory=dict)


class LaggedError(MdevError):
    """The subscriber was too slow; `missed` events are gone. Reading goes on with the oldest that is left."""

    missed: int

    def __init__(self, missed: int) -> None:
        super().__init__(errno.EOVERFLOW, f"{missed} events were missed: this subscriber read too slowly")
        self.missed = missed


class NoEventError(MdevError, TimeoutError):
    """There was no event in the time the subscriber wanted to wait."""


class EventLog:
    """The ring of the last `capacity` events of one registry."""

    def __init__(self, capacity: int = 4096) -> None:
        self._ring: Final[list[Event | None]] = [None] * capacity
        self._changed: Final = threading.Condition()
        self._last = 0
        self._closed = False

    @property
    def last(self) -> int:
        """Sequence number of the newest event, 0 before the first."""
        return self._last

    def emit(self, action: Action, subject: str, env: Mapping[str, str] | None = None) -> Event:
        """Append an event and wake the readers. Callers hold the lock that guards the state the event tells of."""
        with self._changed:
            self._last += 1
            event = Event(self._last, action, subject, time.time(), env or {})
            self._ring[self._last % len(self._ring)] = event
            self._changed.notify_all()
        return event

    def subscribe(self, after: int | None = None) -> Subscription:
        """Return a reader that starts behind event `after`, by default behind the newest; EINVAL for one that is yet to come."""
        newest = self._last
        if after is not None and not 0 <= after <= newest:
            raise MdevError(errno.EINVAL, f"there is no event {after}: the newest is {newest}")
        return Subscription(self, newest if after is None else after)

    def close(self) -> None:
        """Let every reader finish: what is in the ring can still be read, then iteration ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self, reader: Subscription, timeout: float | None) -> Event | None:
        """Return the reader's next event, or None when the log or the reader is closed; NoEventError, LaggedError."""
        position = reader.position
        with self._changed:
            if not self._changed.wait_for(lambda: self._last > position or self._closed or reader.closed, timeout):
                raise NoEventError(errno.ETIMEDOUT, f"no event within {timeout:g} s")
            if self._last <= position or reader.closed:
                return None
            oldest = max(1, self._last - len(self._ring) + 1)
            if position + 1 < oldest:
                raise LaggedError(oldest - position - 1)
            return self._ring[(position + 1) % len(self._ring)]


class Subscription:
    """One reader of an `EventLog`: iterate over it, or call `get`. Belongs to one thread at a time."""

    def __init__(self, log: EventLog, position: int) -> None:
        self._log = log
        #: Sequence number of the last event delivered (or skipped, after a LaggedError).
        self.position = position
        #: Set by `close`.
        self.closed = False

    def close(self) -> None:
        """End the reading, from any thread: whoever waits in `get` gets None."""
        with self._log._changed:
            self.closed = True
            self._log._changed.notify_all()

    def get(self, timeout: float | None = None) -> Event | None:
        """Return the next event, None when the log is closed or this reader is.

        Waits up to `timeout` seconds, for ever by default, then raises NoEventError (a TimeoutError). Raises LaggedError
        once when events were lost.
        """
        try:
            event = self._log._read(self, timeout)
        except LaggedError as error:
            self.position += error.missed
            raise
        if event is not None:
            self.position = event.seq
        return event

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event
