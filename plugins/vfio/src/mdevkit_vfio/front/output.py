"""The sending side of a socket that must never make its process wait. Used on one thread."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from mdevkit_vfio.descriptors import close_all

_FLAGS: Final = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


class Output:
    """Sends on `sock`, and keeps what does not fit until `flush`. A peer that has gone is not noticed here but by whoever reads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._send: Final = sock.send
        self._queue: Final[deque[tuple[memoryview, list[int]]]] = deque()

    @property
    def full(self) -> bool:
        """Whether something is kept. Whoever sends should stop then."""
        return bool(self._queue)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message, or keep it with duplicates of its descriptors."""
        sent = 0 if self._queue else self._try(data, fds)
        if sent < len(data):
            self._queue.append((memoryview(data)[sent:], [] if sent else [os.dup(fd) for fd in fds]))

    def _try(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        """Return how much of `data` the socket has taken."""
        try:
            return socket.send_fds(self._sock, [data], list(fds), _FLAGS) if fds else self._send(data, _FLAGS)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def flush(self) -> None:
        """Send more of what is kept."""
        while self._queue:
            data, fds = self._queue[0]
            sent = self._try(data, fds)
            if not sent:
                return
            close_all(fds)
            if sent < len(data):
                self._queue[0] = (data[sent:], [])
                return
            self._queue.popleft()

    def close(self) -> None:
        """Forget what is kept."""
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
