"""Control messages between a porter, the processes of devices and its fronts: JSON objects with descriptors, on SOCK_SEQPACKET.

A peer that dies with unread messages is seen as a reset before what it has sent is seen; both mean that it has gone. Each
socket is used by one thread.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from mdevkit_vfio.descriptors import close_all

#: The longest message in bytes, and the most descriptors with it.
_LONGEST: Final = 1 << 16
_MAX_FDS: Final = 16


class Note(NamedTuple):
    """A message; whoever gets it owns the descriptors."""

    facts: dict[str, Any]
    fds: list[int]


class Control:
    """One end of a control connection; owns `sock`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: Final = sock

    def fileno(self) -> int:
        """Return the descriptor, to wait for a message."""
        return self.sock.fileno()

    def send(self, facts: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """Send a message; False when the peer has gone. Blocks while the peer has many unread."""
        try:
            socket.send_fds(self.sock, [json.dumps(facts).encode()], list(fds), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def receive(self) -> Note | None:
        """Wait for the next message; None when the peer has gone, or does not speak our language."""
        try:
            data, fds, flags, _ = socket.recv_fds(self.sock, _LONGEST, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        try:
            facts = json.loads(data)
        except ValueError:
            facts = None
        if not isinstance(facts, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(fds)
            return None
        return Note(facts, fds)

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


def pair() -> tuple[Control, Control]:
    """Return two ends."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Control(one), Control(other)
