"""A front: the process between one client and the process of its device. It runs no code of a vendor's, and so it survives.

It passes messages on, one after the other, keeps each until it has been answered, and keeps the client's configuration. When
the device's process dies, the last turn it committed is answered from the park, and the next process gets the journal, the
park and every turn that is left. A client that would have to wait too long for that is told that its request has failed:
QEMU gives up after five seconds, and a reply that came later would be taken for the next one's.

One thread, which waits for everybody in `_wait` or, in the middle of a request, for the device alone.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.peers import client_of

from mdevkit_vfio import proto
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.framing import ANCILLARY, RECEIVE_FLAGS, Ancillary, FramingError, Inbox, PeerGoneError, Received
from mdevkit_vfio.front.control import Control
from mdevkit_vfio.front.journal import JOURNALED, Journal
from mdevkit_vfio.front.output import Output
from mdevkit_vfio.front.wire import TURN_AT, Attach, Limits, Private, next_turn, pack, parse_parked
from mdevkit_vfio.parking import Commit, Park
from mdevkit_vfio.proto import HEADER, HEADER_SIZE, NO_REPLY, TYPE_MASK, TYPE_REPLY, Command
from mdevkit_vfio.reception import Newcomer, Reception

log = logging.getLogger("mdevkit.front")

#: So many deaths before the device has taken a new client, and that client is refused.
FATAL_AT_ATTACH: Final = 5
#: Seconds a front goes on without a client.
LINGER: Final = 1.0
#: Seconds it waits for one peer alone, and the same in milliseconds.
TICK: Final = 0.25
_TICK_MS: Final = TICK * 1000
#: What it holds for the device before it stops reading: messages, and bytes of them.
MAX_TURNS: Final = 1024
MAX_HELD: Final = 1 << 22

_TURN: Final = struct.Struct("=I")


def _stamped(message: bytes, turn: int) -> bytes:
    """Return the message with a turn's number."""
    return message[:TURN_AT] + _TURN.pack(turn) + message[HEADER_SIZE:]


def _receive(sock: socket.socket, inbox: Inbox) -> tuple[int, Ancillary, int]:
    """Receive into an inbox, which has counted it in unless it was empty; OSError at the end of the stream."""
    if not inbox.empty():
        inbox.receive()
        return 0, [], 0
    received, ancillary, flags, _ = sock.recvmsg_into([inbox.view], ANCILLARY, RECEIVE_FLAGS)
    if not received:
        raise PeerGoneError
    return received, ancillary, flags


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


class Turn:
    """A message of the client's that is not known to be done. Owns its descriptors."""

    __slots__ = ("answer", "command", "deadline", "deaths", "fds", "id", "message", "number", "posted", "quiet")

    def __init__(self, number: int, ident: int, command: int, message: bytes, fds: list[int], quiet: bool, deadline: float) -> None:
        self.number = number
        self.id = ident
        self.command = command
        #: The whole message, with the turn's number in it.
        self.message = message
        self.fds = fds
        #: The client wants no reply.
        self.quiet = quiet
        #: The device sends none.
        self.posted = quiet and command not in JOURNALED
        #: When it is answered with an error at the latest.
        self.deadline = deadline
        #: How often the device's process has died of it.
        self.deaths = 0
        #: The errno it is answered with without asking the device, or not any more.
        self.answer = 0


class Front:
    """Serves the clients that come to `listener`, one after the other, with the device that `porter` connects to."""

    def __init__(self, listener: socket.socket, porter: Control, name: str, limits: Limits) -> None:
        self._name: Final = name
        self._fatal, self._patience = limits
        self._porter: Control | None = porter
        # The eventfd is for waits this process does not do.
        self._reception: Final = Reception(listener, os.eventfd(0, os.EFD_CLOEXEC))
        self._listener: Final = listener
        self._poll = select.poll()
        self._stale_poll = True
        self._over = False
        #: When newcomers and deadlines were looked after; events that follow each other closely must not put it off.
        self._looked = self._idle_since = time.monotonic()
        # Of the client.
        self._client: socket.socket | None = None
        self._attach: Attach | None = None
        self._number = 0
        self._hello = b""
        #: The device has taken the client.
        self._greeted = False
        self._turns: Final[deque[Turn]] = deque()
        self._held = 0
        self._journal: Final = Journal()
        self._failed: str | None = None
        self._park: Park | None = None
        self._files: dict[str, int] = {}
        #: Questions of the device's to the client: our message id to the process that asked and its own id.
        self._questions: Final[dict[int, tuple[int, int]]] = {}
        self._question = 0
        # Of the device's process.
        self._device: socket.socket | None = None
        self._process = 0
        #: Since when its process is dead and nothing has been done by the next one; 0 while all is well.
        self._away_since = 0.0
        #: Turns answered without it, whose replies it may still send.
        self._overdue: Final[deque[Turn]] = deque()

    # -- waiting ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until there is no client for a while, or the device is gone."""
        try:
            while not self._over:
                self._step()
        finally:
            self._reception.close()
            self._drop_client()
            self._drop_device()

    def _step(self) -> None:
        ready = self._wait()
        if self._relaying and len(ready) == 1 and self._client is not None and self._client.fileno() in ready:
            self._relay(self._client)
            return
        client, device, porter = self._client, self._device, self._porter
        if device is not None and device.fileno() in ready:
            self._serve_device(ready[device.fileno()])
        if client is not None and client is self._client and client.fileno() in ready:
            self._serve_client(ready[client.fileno()])
        if porter is not None and porter.fileno() in ready:
            self._serve_porter(porter)
        now = time.monotonic()
        if not (ready and self._reception.empty) or self._listener.fileno() in ready or now - self._looked >= TICK:
            self._looked = now
            self._receive_newcomers(ready)
            self._expire()
            self._end_when_idle()

    def _wait(self) -> dict[int, int]:
        if self._stale_poll or not self._reception.empty:
            self._stale_poll = False
            self._poll = self._make_poll()
        return dict(self._poll.poll(self._milliseconds()))

    def _make_poll(self) -> select.poll:
        poll = select.poll()
        fds = self._reception.watched if self._porter is not None else []
        for fd in (*fds, *([self._porter.fileno()] if self._porter is not None else [])):
            poll.register(fd, select.POLLIN)
        if self._client is not None:
            poll.register(self._client, self._client_events())
        if self._device is not None:
            poll.register(self._device, self._device_events())
        return poll

    def _client_events(self) -> int:
        """Return what to wait for. What nobody has room for stays with the client."""
        if self._client_out.full:
            return select.POLLOUT
        busy = self._device is not None and self._device_out.full
        room = len(self._turns) < MAX_TURNS and self._held < MAX_HELD
        # Without an event a socket that is broken is reported all the same.
        return select.POLLIN if room and not busy else 0

    def _device_events(self) -> int:
        events = select.POLLOUT if self._device_out.full else 0
        reading = self._client is None or not self._client_out.full
        return events | (select.POLLIN if reading else 0)

    def _milliseconds(self) -> float:
        moments = [self._patience]
        if self._client is None:
            moments.append(LINGER)
        elif self._turns:
            moments.append(TICK)
        return self._reception.milliseconds(max(0.0, min(moments))) or 0

    # -- the client -------------------------------------------------------------------------------------------------

    def _receive_newcomers(self, ready: dict[int, int]) -> None:
        self._reception.attend(ready)
        for newcomer in self._reception.ready:
            if self._client is not None and _hung_up(self._client):
                # What it has sent last is still to be read; then it is the newcomer's turn.
                continue
            if self._client is not None:
                assert self._attach is not None
                busy = f"{self._name} is in use by {self._attach.client}"
                self._reception.refuse(newcomer, MdevError(errno.EBUSY, busy))
            elif self._device is None:
                # Else the device is not yet free of the last client.
                self._admit(newcomer)
        self._stale_poll = True

    def _admit(self, newcomer: Newcomer) -> None:
        assert newcomer.hello is not None
        message = _stamped(newcomer.message, 0)
        sock = self._client = self._reception.admit(newcomer)
        self._client_out = Output(sock)
        self._client_in = Inbox(sock)
        self._attach = Attach(client_of(sock))
        self._hello = message
        self._add(newcomer.hello.id, Command.VERSION, 0, message, [])
        self._want_device()
        self._stale_poll = True

    def _serve_client(self, events: int) -> None:
        if self._client_out.full:
            self._client_out.flush()
            self._stale_poll = True
            if events & (select.POLLERR | select.POLLHUP):
                self._client_left()
        elif events & select.POLLIN:
            self._receive_client()
        else:
            # Gone while we do not read: what it has sent before nobody needs.
            self._client_left()

    @property
    def _relaying(self) -> bool:
        """Whether nothing is under way but what the client may ask next."""
        if self._turns or self._overdue or self._away_since or not self._greeted or self._device is None:
            return False
        full = self._client_out.full or self._device_out.full
        return not full and self._client_in.empty() and self._device_in.empty() and self._reception.empty

    def _relay(self, client: socket.socket) -> None:
        """Pass requests on as long as they come alone and are answered at once, which is how a guest's processor asks.

        What this does for one register access is what a guest notices of a front, so it is all here, without a `Turn`: one is
        made as soon as anything is out of the ordinary.
        """
        device, inbox, outbox = self._device, self._client_in, self._device_in
        assert device is not None
        asked, poll, send, reply = [(client.fileno(), select.POLLIN)], self._poll.poll, self._device_out.send, self._client_out.send
        hear, heard, buffer, window, heard_window = (
            client.recvmsg_into,
            device.recvmsg_into,
            inbox.buffer,
            [inbox.view],
            [outbox.view],
        )
        unpack, pack_turn = HEADER.unpack_from, _TURN.pack_into
        while True:
            try:
                received, ancillary, flags, _ = hear(window, ANCILLARY, RECEIVE_FLAGS)
            except OSError:
                received = 0
            if not received:
                self._client_left()
                return
            ident, command, size, kind, _ = unpack(buffer)
            # Where the header is not whole, the rest of it is still the last message's.
            if received < HEADER_SIZE or size != received or kind or ancillary or flags != RECEIVE_FLAGS or command in JOURNALED:
                inbox.added(received, ancillary, flags)
                self._work_off(inbox)
                return
            self._number = number = next_turn(self._number)
            pack_turn(buffer, TURN_AT, number)
            message = bytes(inbox.view[:size])
            send(message)
            try:
                received, ancillary, flags, _ = heard(heard_window, ANCILLARY, RECEIVE_FLAGS)
            except OSError as error:
                self._keep(Turn(number, ident, command, message, [], False, time.monotonic() + self._patience))
                if not isinstance(error, BlockingIOError):
                    self._device_gone()
                return
            facts = unpack(outbox.buffer)
            if facts[:3] != (ident, command, received) or ancillary or not facts[3] & TYPE_REPLY:
                self._keep(Turn(number, ident, command, message, [], False, time.monotonic() + self._patience))
                self._take(received, ancillary, flags)
                return
            reply(bytes(outbox.view[:received]))
            if self._client_out.full or poll(_TICK_MS) != asked:
                return

    def _receive_client(self) -> None:
        """Take what has come."""
        inbox, client = self._client_in, self._client
        assert client is not None
        try:
            fresh = inbox.empty()
            received, ancillary, flags = _receive(client, inbox)
        except OSError:
            self._client_left()
            return
        if fresh:
            inbox.added(received, ancillary, flags)
        self._work_off(inbox)

    def _work_off(self, inbox: Inbox) -> None:
        try:
            while self._client is not None and (message := inbox.pop()) is not None:
                if message.flags & TYPE_MASK == TYPE_REPLY and self._take_answer(message):
                    continue
                size = HEADER_SIZE + len(message.payload)
                # What is to be remembered has to be known to be done, so the device replies even if the client wants none.
                flags = message.flags & ~NO_REPLY if message.command in JOURNALED else message.flags
                whole = HEADER.pack(message.id, message.command, size, flags, 0) + message.payload
                self._add(message.id, message.command, message.flags, whole, message.fds, whole_fds=message.complete)
        except FramingError as error:
            self._client_out.send(proto.error_reply(error.id, error.command, error.errno or errno.EINVAL))
            self._client_left()
        self._stale_poll = True

    def _add(self, ident: int, command: int, flags: int, message: bytes, fds: list[int], *, whole_fds: bool = True) -> None:
        """Queue a message as a turn, and send it to the device."""
        self._number = number = next_turn(self._number)
        stamped = _stamped(message, number)
        turn = Turn(number, ident, command, stamped, fds, bool(flags & NO_REPLY), time.monotonic() + self._patience)
        self._keep(turn)
        turn.answer = self._refusal(flags, whole_fds)
        if turn.answer:
            self._settle()
        elif self._device is not None:
            self._device_out.send(stamped, fds)
            self._stale_poll |= self._device_out.full

    def _keep(self, turn: Turn) -> None:
        """Remember a turn until it is known to be done."""
        self._turns.append(turn)
        self._held += len(turn.message)

    def _refusal(self, flags: int, whole_fds: bool) -> int:
        """Return the errno for a message the device is not asked about, or 0."""
        if not whole_fds or flags & TYPE_MASK == TYPE_REPLY:
            # More descriptors than a message may have, or an answer nobody has asked for.
            return errno.EINVAL
        away = self._device is None and self._away_since and time.monotonic() - self._away_since > self._patience
        return errno.EIO if self._failed or away else 0

    def _take_answer(self, message: Received) -> bool:
        """Pass the client's answer to the process that has asked, if it still lives; False if nobody ever asked."""
        asked = self._questions.pop(message.id, None)
        if asked is None:
            return False
        process, ident = asked
        if process == self._process and self._device is not None:
            payload = message.payload
            head = HEADER.pack(ident, message.command, HEADER_SIZE + len(payload), message.flags, message.error)
            self._device_out.send(head + payload)
        close_all(message.fds)
        return True

    def _client_left(self) -> None:
        """Let the device know. What it has been sent it works off before it sees the end of the connection."""
        self._drop_client()
        self._idle_since = time.monotonic()
        if self._failed and self._porter is not None:
            self._porter.send({"op": "failed", "reason": None})
        self._failed = None
        if self._device is not None:
            try:
                self._device.shutdown(socket.SHUT_WR)
            except OSError:
                self._drop_device()

    def _drop_client(self) -> None:
        """Close what is the client's, and forget its device."""
        self._stale_poll = True
        if self._client is not None:
            self._client_in.close()
            self._client_out.close()
            self._client.close()
            self._client = None
        while self._turns:
            close_all(self._turns.popleft().fds)
        self._held = 0
        self._journal.close()
        self._questions.clear()
        self._greeted = False
        self._away_since = 0.0
        self._drop_park()

    # -- the device's process ---------------------------------------------------------------------------------------

    def _want_device(self) -> None:
        if self._porter is not None:
            self._porter.send({"op": "want"})

    def _take_device(self, sock: socket.socket) -> None:
        """Tell a process of the device all it needs, and give it the turns that are left."""
        if self._client is None or self._device is not None or self._failed:
            sock.close()
            return
        # For waiting for a reply alone: not for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(TICK * 1e6)))
        self._device, self._device_out, self._device_in = sock, Output(sock), Inbox(sock)
        self._process += 1
        self._stale_poll = True
        self._introduce(self._device_out)
        for turn in self._turns:
            if not turn.answer:
                self._device_out.send(turn.message, turn.fds)
        if self._away_since and not self._turns:
            self._back()

    def _introduce(self, out: Output) -> None:
        assert self._attach is not None
        if not self._greeted:
            self._drop_park()
            out.send(self._attach.pack())
            return
        assert self._park is not None
        names, fds = list(self._files), [self._park.fd, *self._files.values()]
        out.send(Attach(self._attach.client, resume=True, files=names).pack(), fds)
        out.send(self._hello)
        for entry in self._journal.entries():
            out.send(entry.message, entry.fds)
        out.send(pack(Private.RESUME))

    def _serve_device(self, events: int) -> None:
        if self._device_out.full:
            self._device_out.flush()
            self._stale_poll = True
        if events & ~select.POLLOUT:
            self._receive_device()

    def _receive_device(self) -> None:
        """Take what the device's process sends."""
        inbox, device = self._device_in, self._device
        assert device is not None
        try:
            fresh = inbox.empty()
            received, ancillary, flags = _receive(device, inbox)
        except BlockingIOError:
            return
        except OSError:
            self._device_gone()
            return
        if fresh:
            self._take(received, ancillary, flags)
        else:
            self._take_messages(inbox)

    def _take(self, received: int, ancillary: Ancillary, flags: int) -> None:
        """Take what has been received into the empty inbox; nothing is the end of the connection."""
        if not received:
            self._device_gone()
            return
        self._device_in.added(received, ancillary, flags)
        self._take_messages(self._device_in)

    def _take_messages(self, inbox: Inbox) -> None:
        try:
            while self._device is not None and (message := inbox.pop()) is not None:
                self._take_from_device(message)
        except MdevError as error:
            log.error("%s: its process does not keep to the protocol: %s", self._name, error)
            self._device_gone()

    def _take_from_device(self, message: Received) -> None:
        fds, payload = message.fds, message.payload
        if message.flags & TYPE_MASK == TYPE_REPLY:
            head = HEADER.pack(message.id, message.command, HEADER_SIZE + len(payload), message.flags, message.error)
            self._replied(message.id, message.command, head + payload, fds)
            return
        if message.command == Private.PARKED and self._client is not None:
            self._take_park(parse_parked(payload), fds)
            return
        close_all(fds)
        if message.command == Private.ACK:
            self._acknowledged(message.error)
        elif message.command == Private.HANGUP and self._client is not None:
            self._client_left()
        elif message.command in (Command.DMA_READ, Command.DMA_WRITE) and self._client is not None:
            self._ask(message)

    def _take_park(self, names: list[str], fds: list[int]) -> None:
        self._drop_park()
        if len(fds) != len(names) + 1:
            close_all(fds)
            raise MdevError(errno.EPROTO, f"{len(fds)} descriptors for a park and {len(names)} files")
        self._files = dict(zip(names, fds[1:], strict=True))
        self._park = Park(fds[0])

    def _drop_park(self) -> None:
        if self._park is not None:
            self._park.close()
            self._park = None
        close_all(self._files.values())
        self._files.clear()

    def _ask(self, message: Received) -> None:
        """Pass a question on, under an id that no question of an earlier process has."""
        candidates = (n & 0xFFFF for n in itertools.count(self._question + 1))
        self._question = next(ident for ident in candidates if ident not in self._questions)
        self._questions[self._question] = (self._process, message.id)
        payload = message.payload
        head = HEADER.pack(self._question, message.command, HEADER_SIZE + len(payload), message.flags, message.error)
        self._client_out.send(head + payload)
        self._stale_poll |= self._client_out.full

    def _acknowledged(self, number: int) -> None:
        """Forget the posted turns up to this one."""
        while self._turns and self._turns[0].posted:
            turn = self._forget_first()
            close_all(turn.fds)
            if turn.number == number:
                return

    def _replied(self, ident: int, command: int, reply: bytes, fds: list[int]) -> None:
        """Take the reply to the first turn that wants one."""
        if self._client is None:
            close_all(fds)
            return
        if self._overdue:
            self._overdue.popleft()
            close_all(fds)
            return
        while self._turns and self._turns[0].posted:
            close_all(self._forget_first().fds)
        turn = self._turns[0] if self._turns else None
        if turn is None or turn.id != ident or turn.command != command:
            close_all(fds)
            raise MdevError(errno.EPROTO, f"a reply to {proto.command_name(command)} that nobody waits for")
        self._forget_first()
        if self._away_since:
            self._back()
        self._done(turn, reply, fds)
        if self._turns:
            self._settle()

    def _back(self) -> None:
        """Take note that a new process has done something for the client, or that the client waits for nothing."""
        log.warning("%s: it goes on after %.1f ms", self._name, (time.monotonic() - self._away_since) * 1e3)
        self._away_since = 0.0

    def _forget_first(self) -> Turn:
        turn = self._turns.popleft()
        self._held -= len(turn.message)
        return turn

    def _done(self, turn: Turn, reply: bytes, fds: list[int]) -> None:
        """Send a reply to the client, and remember what the turn has left behind."""
        refused = HEADER.unpack_from(reply)[3] & proto.ERROR
        if turn.command in JOURNALED and not refused:
            self._journal.enter(turn.command, turn.message[HEADER_SIZE:], turn.fds)
        elif turn.fds:
            close_all(turn.fds)
        if not turn.quiet:
            self._client_out.send(reply, fds)
            self._stale_poll |= self._client_out.full
        close_all(fds)
        if not self._greeted:
            self._greeted = not refused
            if refused:
                self._client_left()

    def _device_gone(self) -> None:
        """Take note that the device's process has closed the connection: it is free again, or it has died."""
        self._drop_device()
        if self._client is None:
            self._idle_since = time.monotonic()
            return
        log.warning("%s: its process has died; %d messages wait for the next", self._name, len(self._turns))
        self._away_since = self._away_since or time.monotonic()
        commit = self._park.read() if self._park is not None else Commit(0, b"", b"")
        self._answer_from_park(commit)
        self._blame()
        if self._client is not None and not self._failed:
            self._want_device()

    def _answer_from_park(self, commit: Commit) -> None:
        """Finish the last turn that was committed, and with it all before it."""
        if all(turn.number != commit.turn for turn in self._turns):
            return
        while self._turns:
            turn = self._forget_first()
            if turn.number == commit.turn and not turn.posted:
                self._done(turn, commit.reply, [])
            else:
                close_all(turn.fds)
            if turn.number == commit.turn:
                return

    def _blame(self) -> None:
        """Lay the death to the turn that was being carried out, if there was one."""
        turn = next((turn for turn in self._turns if not turn.answer), None)
        if turn is None or self._client is None:
            return
        if not self._greeted:
            turn.deaths += 1
            if turn.deaths >= FATAL_AT_ATTACH:
                log.error("%s: its process has died %d times while it took a client", self._name, turn.deaths)
                self._done(self._forget_first(), proto.error_reply(turn.id, turn.command, errno.EIO), [])
        elif self._park is not None and self._park.begun == turn.number:
            turn.deaths += 1
            # The next process may die before it has come that far.
            self._park.begin(0)
            if turn.deaths >= self._fatal:
                self._fail(f"its process has died {turn.deaths} times in a row of a client's {proto.command_name(turn.command)}")

    def _fail(self, reason: str) -> None:
        log.error("%s has failed: %s", self._name, reason)
        self._failed = reason
        for turn in self._turns:
            turn.answer = turn.answer or errno.EIO
        if self._porter is not None:
            self._porter.send({"op": "failed", "reason": reason})
        self._settle()

    def _drop_device(self) -> None:
        self._stale_poll = True
        self._overdue.clear()
        if self._device is not None:
            self._device_in.close()
            self._device_out.close()
            self._device.close()
            self._device = None

    # -- turns the device does not answer ---------------------------------------------------------------------------

    def _expire(self) -> None:
        """Answer what has waited for too long. The device may do it later; nobody will know."""
        now = time.monotonic()
        late = [turn for turn in self._turns if turn.deadline <= now and not turn.answer]
        if self._device is not None:
            # A process that lives has been sent all of them, and will reply to those that want a reply.
            late = [turn for turn in late if not turn.posted]
            self._overdue.extend(late)
        for turn in late:
            turn.answer = errno.ETIMEDOUT
        if late:
            log.error("%s: %d requests were not answered in time", self._name, len(late))
            self._settle()

    def _settle(self) -> None:
        """Send the answers of our own to turns that no reply of the device's has to come before."""
        kept: list[Turn] = []
        while self._turns and (self._turns[0].answer or self._turns[0].posted):
            turn = self._forget_first()
            if not turn.answer:
                kept.append(turn)
                continue
            close_all(turn.fds)
            if not turn.quiet:
                self._client_out.send(proto.error_reply(turn.id, turn.command, turn.answer))
        self._turns.extendleft(reversed(kept))
        self._held += sum(len(turn.message) for turn in kept)
        self._stale_poll = True

    # -- the porter -------------------------------------------------------------------------------------------------

    def _serve_porter(self, porter: Control) -> None:
        note = porter.receive()
        self._stale_poll = True
        if note is None:
            # Without it there is no other process for the device. The one there is goes on with the client there is.
            log.error("%s: its porter has died", self._name)
            porter.close()
            self._porter = None
            self._listener.close()
        elif note.facts["op"] == "device":
            self._take_device(socket.socket(fileno=note.fds[0]))
        elif note.facts["op"] == "remove":
            self._over = True

    def _end_when_idle(self) -> None:
        if self._client is not None or self._device is not None or not self._reception.empty:
            self._idle_since = time.monotonic()
        elif self._porter is None or time.monotonic() - self._idle_since > LINGER:
            self._over = True
