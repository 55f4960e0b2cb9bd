"""What a front and the process of its device say to each other: the client's messages, and a few of our own.

The connection carries vfio-user messages as they are. A command has no use for the errno field of its header, so that is
where a front puts the number of the *turn*; 0 marks what comes from the journal and gets no reply. Commands of our own have
numbers no vfio-user command has: a client's command of such a number is passed on too, and refused like any unknown one,
because a device's process takes ours only before the client's first turn.

A session goes like this (F front, D device's process):

    F  ATTACH        who the client is; to go on: the park and the files as well
    F  VERSION       the client's; as a turn, or from the journal to go on
       to go on: F DMA_MAP and SET_IRQS from the journal, F RESUME
       for a new client: D PARKED with the park and the files, then the reply to VERSION
    F  turns         each is answered by a reply, or together with others by ACK if the client wants no reply
    F  half-closes the connection when the client has gone; D closes it once the device is free

Pure functions; any thread.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from mdevkit.errors import MdevError
from mdevkit.peers import Client

from mdevkit_vfio.proto import HEADER, HEADER_SIZE, Buffer

#: Where in a header the turn is.
TURN_AT: Final = 12
_LAST_TURN: Final = (1 << 32) - 1


class Limits(NamedTuple):
    """What a front puts up with; other figures are for tests."""

    #: So many deaths of the device's process in a row in the middle of one request, and the device has failed.
    fatal: int = 2
    #: Seconds after which a request is answered with an error: less than QEMU's x-msg-timeout of 5.
    patience: float = 4.5


USUAL_LIMITS: Final = Limits()


class Private(IntEnum):
    """Commands of our own."""

    ATTACH = 0xFF01
    RESUME = 0xFF02
    PARKED = 0xFF03
    #: In the turn field: every turn up to here has been committed.
    ACK = 0xFF04
    #: The client is to be cut off.
    HANGUP = 0xFF05


def next_turn(turn: int) -> int:
    """Return the number of the turn after `turn`; 0 is none."""
    return turn + 1 if turn < _LAST_TURN else 1


def pack(command: int, payload: Buffer = b"", *, ident: int = 0, flags: int = 0, turn: int = 0) -> bytes:
    """Return a message with a turn number."""
    return HEADER.pack(ident, command, HEADER_SIZE + len(payload), flags, turn) + payload


class Attach(NamedTuple):
    """ATTACH: a client, and with `resume` that it has been there all along. Descriptors: the park's, then those of `files`."""

    client: Client
    resume: bool = False
    files: Sequence[str] = ()

    def pack(self) -> bytes:
        """Return the message."""
        client = [self.client.pid, self.client.uid, self.client.name]
        return pack(Private.ATTACH, _json({"client": client, "resume": self.resume, "files": list(self.files)}))

    @classmethod
    def parse(cls, payload: Buffer) -> Attach:
        """Read a payload; EPROTO."""
        facts = _object(payload)
        return cls(Client(*facts["client"]), facts["resume"], facts["files"])


def pack_parked(files: Sequence[str]) -> bytes:
    """Return PARKED, which goes with the park's descriptor and those of `files`."""
    return pack(Private.PARKED, _json({"files": list(files)}))


def parse_parked(payload: Buffer) -> list[str]:
    """Return the files' names; EPROTO."""
    return [str(name) for name in _object(payload)["files"]]


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts).encode()


def _object(payload: Buffer) -> Mapping[str, Any]:
    try:
        facts = json.loads(bytes(payload))
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise MdevError(errno.EPROTO, "a front and the process of its device do not understand each other")
    return facts
