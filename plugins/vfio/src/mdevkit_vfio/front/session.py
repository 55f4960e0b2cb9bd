"""A session whose connection is a front's: what the process of a device does so that it may die at any instruction.

It differs from a session with the client itself (`mdevkit_vfio.session`) in this: each turn is carried out under the device's
lock, and its reply is committed to the park together with the state before anybody sees it; and a session may begin in the
middle, with a journal, a park and a client that has been there all along.

Threads as `mdevkit_vfio.session.Session`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from mdevkit.errors import MdevError, wrap

from mdevkit_vfio import proto
from mdevkit_vfio.commands import Commands
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.framing import ANCILLARY, RECEIVE_FLAGS, PeerGoneError, Received
from mdevkit_vfio.front.wire import Attach, Private, pack, pack_parked
from mdevkit_vfio.link import NO_SIGNAL, Link
from mdevkit_vfio.ops import VfioOps
from mdevkit_vfio.parking import Park, Parkable
from mdevkit_vfio.proto import HEADER, HEADER_SIZE, MAX_MSG_FDS, Command, Header
from mdevkit_vfio.reception import Hello
from mdevkit_vfio.session import Observer, Session, execute
from mdevkit_vfio.throttle import Throttle

log = logging.getLogger("mdevkit.vfio")

#: Turns without a reply between two acknowledgements, as long as more of them are there.
_ACK_EVERY: Final = 32


class ParkableOps(VfioOps, Parkable, Protocol):
    """The ops of a device that can go on in another process."""


class Greeting:
    """What a front says first. Owns the descriptors until `take`."""

    def __init__(self, sock: socket.socket) -> None:
        """Receive it: OSError when the front has gone, EPROTO for anything else."""
        head, payload, self._fds = _receive(sock)
        try:
            self.attach: Final = Attach.parse(payload)
            if head.command != Private.ATTACH or len(self._fds) != (len(self.attach.files) + 1 if self.attach.resume else 0):
                raise MdevError(errno.EPROTO, f"a session begins with command {head.command}")
            head, payload, fds = _receive(sock)
            close_all(fds)
            self.hello: Final = Hello(head.id, proto.Version.parse(payload))
            #: The turn the client's VERSION is.
            self.turn: Final = head.error
        except BaseException:
            self.close()
            raise

    def take(self) -> list[int]:
        """Return the descriptors, which are the caller's from now on: none, or the park's and the files'."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close what nobody has taken."""
        close_all(self.take())


def _receive(sock: socket.socket) -> tuple[Header, bytes, list[int]]:
    """Receive one message and not a byte of the next."""
    data, fds, _, _ = socket.recv_fds(sock, HEADER_SIZE, MAX_MSG_FDS, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL)
    if len(data) < HEADER_SIZE:
        close_all(fds)
        raise PeerGoneError
    head = Header(*HEADER.unpack(data))
    payload = sock.recv(head.size - HEADER_SIZE, socket.MSG_WAITALL) if head.size > HEADER_SIZE else b""
    return head, payload, fds


class _ParkedLink(Link):
    """Keeps a reply until its turn has been committed."""

    _kept: tuple[bytes, Sequence[int]] | None = None

    def send(self, head: bytes, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """See `Link.send`: not before `release`."""
        self._kept = (head + payload, fds)

    @property
    def kept(self) -> tuple[bytes, Sequence[int]]:
        """The reply that waits, empty if there is none."""
        return self._kept or (b"", ())

    def release(self) -> bool:
        """Send the reply that waits; False if there is none."""
        kept, self._kept = self._kept, None
        if kept is None:
            return False
        data, fds = kept
        super().send(data, b"", fds)
        return True


class ParkedSession(Session):
    """A session with a front that has sent `greeting`, which it owns."""

    def __init__(
        self,
        ops: ParkableOps,
        sock: socket.socket,
        greeting: Greeting,
        *,
        name: str,
        throttle: Throttle,
        observer: Observer | None,
        ended: Callable[[], None],
    ) -> None:
        self._device_ops: Final = ops
        self._greeting: Final = greeting
        self._park: Park | None = None
        self._unacknowledged = 0
        super().__init__(
            ops,
            sock,
            greeting.hello,
            name=name,
            throttle=throttle,
            observer=observer,
            ended=ended,
            client=greeting.attach.client,
        )

    def shut(self) -> None:
        """Have the front cut off the client, and break the connection; any thread."""
        self._hang_up()
        super().shut()

    def _hang_up(self) -> None:
        with self._close_lock, contextlib.suppress(OSError):
            self._sock.send(pack(Private.HANGUP), NO_SIGNAL | socket.MSG_DONTWAIT)

    # -- beginning and end ------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        link = _ParkedLink(self._sock, self._limit)
        attach, fds = self._greeting.attach, self._greeting.take()
        ops = self._device_ops
        try:
            with self._device("open"):
                if attach.resume:
                    self._park = Park(fds[0])
                    ops.adopt(dict(zip(attach.files, fds[1:], strict=True)))
                ops.open(link)
        except MdevError as error:
            self._refuse(link, error)
            return
        try:
            self._serve(link)
        finally:
            ops.park(None)
            link.hang_up()
            self._release()
            if self._park is not None:
                self._park.close()

    def _refuse(self, link: Link, error: MdevError) -> None:
        """Refuse the client; one that has been there all along can only be cut off."""
        if self._greeting.attach.resume:
            log.error("%s: the device cannot go on: %s", self._name, error)
            self._hang_up()
        else:
            self._refuse_hello(link, error)

    def _refuse_hello(self, link: Link, error: MdevError) -> None:
        super()._refuse_hello(link, error)
        assert isinstance(link, _ParkedLink)
        link.release()

    def _serve(self, link: Link) -> None:
        assert isinstance(link, _ParkedLink)
        try:
            with self._device("describe itself"):
                commands = self._describe()
                park = self._resume(commands) if self._park is not None else self._begin(link)
        except MdevError as error:
            self._refuse(link, error)
            return
        self._loop_parked(link, commands, park)

    def _begin(self, link: _ParkedLink) -> Park:
        """Give the front the park, then the client the reply to its VERSION."""
        ops = self._device_ops
        park = self._park = Park.create(self._name)
        ops.park(park.commit)
        files = ops.files()
        socket.send_fds(self._sock, [pack_parked(list(files))], [park.fd, *files.values()], NO_SIGNAL)
        reply = self._welcome()
        with ops.lock:
            park.turn, park.reply = self._greeting.turn, reply
        link.send(reply)
        link.release()
        return park

    def _resume(self, commands: Commands) -> Park:
        """Go on where the last process died: what the client has given, then the state."""
        park, ops = self._park, self._device_ops
        assert park is not None
        state = park.resume()
        while (message := self._next()).command != Private.RESUME:
            try:
                execute(message, commands)
            except OSError as error:
                log.error("%s: %s again: %s", self._name, proto.command_name(message.command), error)
            finally:
                close_all(message.fds)
        ops.restore(state)
        ops.park(park.commit)
        return park

    def _next(self) -> Received:
        """Wait for the next message."""
        while (message := self._inbox.pop()) is None:
            self._inbox.receive()
        return message

    # -- turns ------------------------------------------------------------------------------------------------------

    def _loop_parked(self, link: _ParkedLink, commands: Commands, park: Park) -> None:
        """Serve until the client goes. As `Session._loop`, a lone register read is handled right here."""
        self._work_off(link, commands)
        turn, throttle, inbox, buffer = self._turn, self._throttle, self._inbox, self._inbox.buffer
        receive, window, send = self._sock.recvmsg_into, [inbox.view], self._sock.sendall
        read, sizes, regions, lock = self._ops.read, commands.readable, len(commands.readable), self._device_ops.lock
        most, command, kind = commands.most, int(Command.REGION_READ), proto.TYPE_REPLY
        while True:
            turn.idle = True
            received, ancillary, flags, _ = receive(window, ANCILLARY, RECEIVE_FLAGS)
            turn.idle = False
            throttle.last = turn
            if received == _READ_SIZE and flags == RECEIVE_FLAGS and not ancillary and self.observer is None:
                ident, head, number, offset, region, count = _unpack_read(buffer)
                if head == _READ_HEAD and count <= most and region < regions and offset + count <= sizes[region]:
                    park.begin(number)
                    with lock:
                        try:
                            data = read(region, offset, count)
                            reply = _pack_reply(ident, command, _READ_SIZE + count, kind, 0, offset, region, count) + data
                            if len(data) != count:
                                reply = self._short_read(offset, region, count, len(data))
                        except OSError as error:
                            reply = self._failed_known(offset, region, count, error)
                        except Exception as error:
                            log.exception("%s: the device failed to read region %d at %#x", self._name, region, offset)
                            reply = self._failed_known(offset, region, count, wrap(error, "REGION_READ"))
                        park.turn, park.reply = number, reply
                    send(reply, NO_SIGNAL)
                    continue
            if not received:
                return
            inbox.added(received, ancillary, flags)
            self._work_off(link, commands)

    def _handle(self, message: Received, link: Link, commands: Commands) -> None:
        """Carry out a turn, commit it, and only then reply. Replies to questions of ours are no turns."""
        if message.flags & proto.TYPE_MASK == proto.TYPE_REPLY:
            link.deliver(message)
            close_all(message.fds)
            return
        park = self._park
        assert isinstance(link, _ParkedLink)
        assert park is not None
        park.begin(message.error)
        with self._device_ops.lock:
            super()._handle(message, link, commands)
            reply, fds = link.kept
            if not fds:
                # A reply with descriptors cannot be kept: such a question is asked again.
                park.turn, park.reply = message.error, reply
        if not link.release():
            self._acknowledge(message.error)

    def _acknowledge(self, number: int) -> None:
        """Let the front forget turns it gets no reply for."""
        self._unacknowledged += 1
        if self._inbox.empty() or self._unacknowledged >= _ACK_EVERY:
            self._unacknowledged = 0
            self._sock.sendall(pack(Private.ACK, turn=number), NO_SIGNAL)


#: As in `mdevkit_vfio.session`, with the turn in the place of the errno.
_READ_SIZE: Final = proto.READ.size
_READ_HEAD: Final = struct.pack("=HII", Command.REGION_READ, _READ_SIZE, proto.TYPE_COMMAND)
_unpack_read: Final = struct.Struct("=H10sIQII").unpack_from
_pack_reply: Final = proto.READ.pack
