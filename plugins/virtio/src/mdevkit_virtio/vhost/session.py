"""One frontend's connection: takes messages in, has the backend carry them out, and replies.

Everything a client can do wrong ends in a refusal, or in the end of this connection where a refusal would not be heard: a message
without a reply of its own and without NEED_REPLY, or one whose reply has no room for it. Nothing here waits. Used on the
server's thread for the device only, but for `Session.client` and `Session.done`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mdevkit.errors import MdevError, brief, wrap
from mdevkit.peers import client_of

from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.backend import Backend
from mdevkit_virtio.vhost.descriptors import close_all
from mdevkit_virtio.vhost.framing import Inbox, Message
from mdevkit_virtio.vhost.proto import Request
from mdevkit_virtio.vhost.sources import hung_up

log = logging.getLogger("mdevkit.virtio")

#: Messages worked off before others get a turn.
BATCH: Final = 64
#: Messages within a second that are worked off at full speed, and the seconds that each one beyond them costs its client:
#: floods must not cost the other devices of the process their rate.
QUICK: Final = 2000
PENALTY: Final = 0.001


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message and what became of it, as an observer sees it. Parse the payloads with `mdevkit_virtio.vhost.proto`."""

    request: int
    flags: int
    payload: bytes
    #: Descriptors that came along.
    fds: int
    #: The reply's payload; None if there was none.
    reply: bytes | None
    #: Why it was refused.
    error: MdevError | None


Observer = Callable[[Exchange], None]


class Session:
    """The client at the other end of `sock`, which is not blocking; `name` is the device's."""

    def __init__(self, sock: socket.socket, backend: Backend, name: str) -> None:
        self.client: Final = client_of(sock)
        #: Set once the device is released and free for the next client.
        self.done: Final = threading.Event()
        #: Called after each message; may be replaced at any time. What it raises is logged and ignored.
        self.observer: Observer | None = None
        self.backend: Final = backend
        self._sock: Final = sock
        self._name: Final = name
        self._inbox: Final = Inbox(sock)
        self._second = 0
        self._messages = 0

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self._sock.fileno()

    def hung_up(self) -> bool:
        """Whether the client has closed its end, though there may be messages left."""
        return hung_up(self._sock)

    def open(self) -> None:
        """Take the device; MdevError if it cannot be reset."""
        with _device("be opened"):
            self.backend.open()

    def close(self) -> None:
        """Give the device back and close the connection."""
        try:
            with _device("be released"):
                self.backend.close()
        except MdevError as error:
            log.warning("%s: %s", self._name, error)
        finally:
            self._inbox.close()
            self._sock.close()
            self.done.set()

    def work(self) -> None:
        """Carry out what has come in, up to a batch. Raises OSError when the connection has ended, or has to."""
        for _ in range(BATCH):
            message = self._inbox.receive()
            if message is None:
                return
            self._pace()
            self._handle(message)

    def _pace(self) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._messages = second, 0
        self._messages += 1
        if self._messages > QUICK:
            # Only this device's client waits for it.
            time.sleep(PENALTY)

    def _handle(self, message: Message) -> None:
        reply: bytes | None = None
        failure: MdevError | None = None
        given = len(message.fds)
        try:
            reply = self._execute(message)
        except MdevError as error:
            # Without its traceback, which has the client's memory in its hands.
            failure = brief(error)
        finally:
            close_all(message.fds)
        if self.observer is not None:
            self._observe(message, given, reply, failure)
        self._answer(message, reply, failure)

    def _execute(self, message: Message) -> bytes | None:
        if message.flags & proto.REPLY:
            raise proto.invalid(message.request, "it is a reply to nothing")
        if not message.complete:
            raise proto.invalid(message.request, f"it has more than {proto.MAX_MSG_FDS} descriptors, or ours ran out")
        with _device(f"carry out {proto.request_name(message.request)}"):
            return self.backend.execute(message.request, message.payload, message.fds)

    def _answer(self, message: Message, reply: bytes | None, failure: MdevError | None) -> None:
        acknowledged = bool(message.flags & proto.NEED_REPLY) and self.backend.acknowledges
        if failure is not None:
            log.warning("%s: %s of %s is refused: %s", self._name, proto.request_name(message.request), self.client, failure)
            reply = self._refusal(message.request, failure, acknowledged=acknowledged)
        elif reply is None and acknowledged:
            reply = proto.pack_u64(0)
        if reply is not None:
            self._send(proto.reply(message.request, reply))

    @staticmethod
    def _refusal(request: int, failure: MdevError, *, acknowledged: bool) -> bytes:
        """Return the reply that refuses a request; raises `failure` where there is none."""
        if request == Request.GET_CONFIG:
            return b""
        if acknowledged and request not in _ANSWERED:
            return proto.pack_u64(failure.errno or errno.EIO)
        raise failure

    def _send(self, data: bytes) -> None:
        try:
            sent = self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            raise MdevError(errno.EPROTO, f"{self.client} does not read its replies")

    def _observe(self, message: Message, fds: int, reply: bytes | None, failure: MdevError | None) -> None:
        exchange = Exchange(message.request, message.flags, message.payload, fds, reply, failure)
        try:
            if self.observer is not None:
                self.observer(exchange)
        except Exception:
            log.exception("%s: the observer failed", self._name)


#: Requests with a reply of their own, which has no room for an error.
_ANSWERED: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_VRING_BASE,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
    }
)


@contextlib.contextmanager
def _device(doing: str) -> Iterator[None]:
    """Turn whatever the device raises into an `MdevError`; what is no OSError is a bug of the device, and logged."""
    try:
        yield
    except MdevError:
        raise
    except OSError as error:
        raise wrap(error, f"the device cannot {doing}") from error
    except Exception as error:
        log.exception("the device cannot %s", doing)
        raise wrap(error, f"the device cannot {doing}") from error
