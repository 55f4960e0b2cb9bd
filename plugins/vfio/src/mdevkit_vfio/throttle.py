"""Fairness between the clients of one process.

Python runs one thread at a time. A client that sends without waiting for replies keeps its thread busy, and the thread of
another client that has just received something then waits for the interpreter's switch interval (5 ms) instead of
microseconds, and perhaps for a processor too. So a session that works off such a backlog looks around every few messages,
and pauses each time as long as others are at work. Sessions whose clients wait for each reply pay nothing but two stores
per message.

A `Throttle` is shared by the servers of a process through their constructor; any thread may call it. A `Turn` is the
view of one session on it and is used on that session's thread; the others only read its attributes.
"""

from __future__ import annotations

import select
import threading
import time
from typing import Final

#: Seconds given away at a time (the kernel's timer slack adds as much): what a waiting thread needs to be woken and to
#: finish a message.
PAUSE: Final = 50e-6
#: Seconds of work between two looks around.
SLICE: Final = 25e-6
#: Seconds for which another session counts as being at work after its last message.
MEMORY: Final = 0.1


class Throttle:
    """The sessions of one process that give way to each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: Final[dict[int, Turn]] = {}
        #: Who had a message without a backlog last; a plain store by whoever it is, so a hint and no more.
        self.last: Turn | None = None
        #: Changes with every client that comes or goes.
        self.generation = 0

    @property
    def sessions(self) -> int:
        """How many clients are attached."""
        return len(self._turns)

    def join(self, fd: int) -> Turn:
        """Add the client attached through socket `fd`; `leave` must come before that is closed."""
        turn = Turn(self, fd)
        with self._lock:
            self._turns[fd] = turn
            self.generation += 1
        return turn

    def leave(self, turn: Turn) -> None:
        """Remove a client."""
        with self._lock:
            self._turns.pop(turn.fd, None)
            self.generation += 1
            if self.last is turn:
                self.last = None

    def others(self, me: Turn) -> tuple[int, dict[int, Turn]]:
        """Return the generation, and every other session by its descriptor."""
        with self._lock:
            return self.generation, {fd: turn for fd, turn in self._turns.items() if turn is not me}


class Turn:
    """One session's place among the others."""

    __slots__ = ("_due", "_generation", "_others", "_poll", "_throttle", "_until", "fd", "idle")

    def __init__(self, throttle: Throttle, fd: int) -> None:
        self.fd: Final = fd
        #: Waiting for the client, not inside a message. A session stuck in one is waited for by nobody.
        self.idle = True
        self._throttle: Final = throttle
        self._due = 0.0
        self._until = 0.0
        self._generation = -1
        self._others: dict[int, Turn] = {}
        self._poll = select.poll()

    def step(self) -> None:
        """Call between the messages of a backlog, and between the parts of a long one."""
        if self._throttle.sessions > 1 and time.monotonic() >= self._due:
            if self._wanted():
                time.sleep(PAUSE)
            self._due = time.monotonic() + SLICE

    def _wanted(self) -> bool:
        """Whether another session has worked lately, or its client has sent what its thread could not take yet."""
        now = time.monotonic()
        if self._throttle.last is not self:
            self._throttle.last = self
            self._until = now + MEMORY
        elif now >= self._until and any(turn.idle for turn in self._waiting()):
            self._until = now + MEMORY
        return now < self._until

    def _waiting(self) -> list[Turn]:
        """Return the others whose clients have sent something."""
        if self._generation != self._throttle.generation:
            self._generation, self._others = self._throttle.others(self)
            self._poll = select.poll()
            for fd in self._others:
                self._poll.register(fd, select.POLLIN)
        # A session that has just left may still be polled; its descriptor may even be somebody else's by now. Harmless.
        return [self._others[fd] for fd, _ in self._poll.poll(0)]
