"""One client's connection: its thread takes messages, has them carried out, and replies.

The thread blocks in one receive into a preallocated buffer and answers with one send; nearly every message of a guest is a
register read, and that one is handled in the loop itself. Everything a client can do wrong ends in an error reply, or in
the end of this connection where the stream has lost its framing; it never leaves this thread.

Threads: `start` makes the connection's thread, which alone calls the device's ops. `shut`, `drain`, `hung_up`, `join` and
the attributes are for the thread of the server (`mdevkit_vfio.server`); they take no lock that the connection's thread
holds while it waits for its client.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mdevkit.errors import MdevError, wrap
from mdevkit.peers import Client, client_of

from mdevkit_vfio import proto
from mdevkit_vfio.commands import Answer, Commands
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.framing import ANCILLARY, RECEIVE_FLAGS, FramingError, Inbox, Received
from mdevkit_vfio.link import NO_SIGNAL, Link
from mdevkit_vfio.ops import VfioOps
from mdevkit_vfio.proto import Command
from mdevkit_vfio.reception import Hello
from mdevkit_vfio.throttle import Throttle

log = logging.getLogger("mdevkit.vfio")

#: The minor version proposed by the rust-vmm client, which waits for the data of a read even if an error reply says that
#: there is none. It gets what a failed read returns on a PCI bus: all ones.
_RUST_MINOR: Final = 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """One command and what became of it, as an observer sees it. Parse the payloads with `mdevkit_vfio.proto`."""

    command: int
    #: The client wanted no reply.
    posted: bool
    request: bytes
    #: Descriptors that came along.
    fds: int
    #: 0, or the errno of the error reply, with its sentence.
    errno: int
    reason: str
    reply: bytes
    #: time.monotonic() when the message had been received, and seconds until its end.
    began: float
    seconds: float


#: Called on the connection's thread after each command, replied or not. What it raises is logged and ignored.
Observer = Callable[[Exchange], None]


class Session:
    """A connection that has said VERSION. `ended` is called on its thread, last of all."""

    def __init__(
        self,
        ops: VfioOps,
        sock: socket.socket,
        hello: Hello,
        *,
        name: str,
        throttle: Throttle,
        observer: Observer | None,
        ended: Callable[[], None],
        client: Client | None = None,
    ) -> None:
        #: Who the client is; by default who is at the other end of the socket.
        self.client: Final = client or client_of(sock)
        #: Set once the device is released and free for the next client.
        self.done: Final = threading.Event()
        #: May be replaced at any time.
        self.observer = observer
        self._ops: Final = ops
        self._sock: Final = sock
        self._hello: Final = hello
        self._name: Final = name
        self._throttle: Final = throttle
        self._ended: Final = ended
        self._limit: Final = min(hello.version.capabilities.max_data_xfer_size, proto.MAX_DATA_XFER_SIZE)
        self._turn: Final = throttle.join(sock.fileno())
        self._inbox: Final = Inbox(sock)
        self._close_lock: Final = threading.Lock()
        self._commands: Commands | None = None
        self._thread: Final = threading.Thread(target=self._run, name=f"{name} client", daemon=True)

    # -- for the server's thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve. EAGAIN if the system has no thread left; then the connection is closed."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._end()
            raise MdevError(errno.EAGAIN, f"{self._name} cannot serve {self.client}: {error}") from error

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 once closed."""
        return self._sock.fileno()

    def hung_up(self) -> bool:
        """Whether the client has closed its end, though the device may not be released yet."""
        poll = select.poll()
        with self._close_lock:
            if self._sock.fileno() < 0:
                return True
            poll.register(self._sock, select.POLLRDHUP)
            return bool(poll.poll(0))

    def shut(self) -> None:
        """Break the connection; the thread notices and ends."""
        with self._close_lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def drain(self) -> None:
        """Empty the client's eventfds, in case the thread is blocked in a write to one. Never blocks."""
        if self._commands is not None:
            self._commands.grants.drain()

    def join(self) -> None:
        """Wait for the thread. Call once `done` is set."""
        self._thread.join()

    @property
    def current(self) -> bool:
        """Whether the caller is the connection's own thread."""
        return self._thread is threading.current_thread()

    # -- the connection's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._attach()
        except OSError as error:
            log.debug("%s: the connection of %s ended: %s", self._name, self.client, error)
        except Exception:
            log.exception("%s: serving %s failed", self._name, self.client)
        finally:
            self._end()
            self._ended()

    def _end(self) -> None:
        self._throttle.leave(self._turn)
        self._inbox.close()
        with self._close_lock:
            self._sock.close()
        self.done.set()

    def _attach(self) -> None:
        link = Link(self._sock, self._limit)
        try:
            with self._device("open"):
                self._ops.open(link)
        except MdevError as error:
            self._refuse_hello(link, error)
            return
        try:
            self._serve(link)
        finally:
            link.hang_up()
            self._release()

    def _release(self) -> None:
        with contextlib.suppress(MdevError), self._device("release"):
            self._ops.release()
        if self._commands is not None:
            self._commands.grants.close()

    def _serve(self, link: Link) -> None:
        try:
            with self._device("describe itself"):
                commands = self._describe()
        except MdevError as error:
            self._refuse_hello(link, error)
            return
        link.send(self._welcome())
        self._loop(link, commands)

    def _describe(self) -> Commands:
        """Ask the device what it is."""
        self._commands = Commands(self._ops, self._turn, self._limit, self._hello.version.capabilities.max_msg_fds)
        return self._commands

    def _welcome(self) -> bytes:
        """Return the reply to the client's VERSION, which names those of our capabilities that the client has named."""
        asked = self._hello.version
        answer = proto.Version(proto.MAJOR, min(asked.minor, proto.MINOR), proto.OURS)
        return proto.reply(self._hello.id, Command.VERSION, answer.pack(asked.capabilities.named))

    def _refuse_hello(self, link: Link, error: MdevError) -> None:
        log.warning("%s: the device refuses %s: %s", self._name, self.client, error)
        link.send(proto.error_reply(self._hello.id, Command.VERSION, _number(error)))

    def _loop(self, link: Link, commands: Commands) -> None:
        """Serve until the client goes.

        A lone register read is handled right here, without a call or a lock that is not needed: how long it takes is what
        a guest notices. A guest reads few registers and reads them often, so a request is taken apart and checked once and
        from then on known by its bytes. Everything else goes through `_work_off`.
        """
        turn, throttle, inbox = self._turn, self._throttle, self._inbox
        receive, window, send = self._sock.recvmsg_into, [inbox.view], self._sock.sendall
        ident, request = inbox.view[:2], inbox.view[2:_READ_SIZE]
        reads, read, join = commands.reads, self._ops.read, b"".join
        while True:
            received, ancillary, flags, _ = receive(window, ANCILLARY, RECEIVE_FLAGS)
            if received == _READ_SIZE and not ancillary and self.observer is None:
                known = reads.get(bytes(request)) or commands.learn_read(bytes(request))
                if known is not None:
                    region, offset, count, head = known
                    try:
                        data = read(region, offset, count)
                        if len(data) == count:
                            reply = join((ident, head, data))
                        else:
                            reply = self._short_read(offset, region, count, len(data))
                    except OSError as error:
                        reply = self._failed_known(offset, region, count, error)
                    except Exception as error:
                        log.exception("%s: the device failed to read region %d at %#x", self._name, region, offset)
                        reply = self._failed_known(offset, region, count, wrap(error, "REGION_READ"))
                    send(reply, NO_SIGNAL)
                    throttle.last = turn
                    continue
            elif received > _READ_SIZE and not ancillary and self.observer is None and self._lone_write(received, commands):
                throttle.last = turn
                continue
            if not received:
                return
            turn.idle = False
            inbox.added(received, ancillary, flags)
            self._work_off(link, commands)
            turn.idle = True

    def _lone_write(self, received: int, commands: Commands) -> bool:
        """Do the register write that is all there is in the buffer; False if it is anything else, or not plainly right."""
        ident, command, size, flags, _, offset, region, count = _unpack_access(self._inbox.buffer)
        if command != Command.REGION_WRITE or flags or size != received or count != received - _READ_SIZE:
            return False
        if count > commands.most or region >= len(commands.writable) or offset + count > commands.writable[region]:
            return False
        try:
            self._ops.write(region, offset, bytes(self._inbox.view[_READ_SIZE:received]))
            reply = _pack_access(ident, command, _READ_SIZE, proto.TYPE_REPLY, 0, offset, region, count)
        except OSError as error:
            reply = proto.error_reply(ident, command, _number(error))
        except Exception as error:
            log.exception("%s: the device failed to write region %d at %#x", self._name, region, offset)
            reply = proto.error_reply(ident, command, _number(wrap(error, "REGION_WRITE")))
        self._sock.sendall(reply, NO_SIGNAL)
        return True

    def _short_read(self, offset: int, region: int, count: int, size: int) -> bytes:
        error = MdevError(errno.EIO, f"the device returned {size} bytes for a read of {count}")
        log.error("%s: %s", self._name, error)
        return self._failed_known(offset, region, count, error)

    def _failed_known(self, offset: int, region: int, count: int, error: OSError) -> bytes:
        """Return the reply to the read in the buffer, which has failed."""
        ident, *_ = proto.HEADER.unpack_from(self._inbox.buffer)
        return self._failed_read(ident, proto.Access(offset, region, count), error)

    def _failed_read(self, ident: int, access: proto.Access, error: OSError) -> bytes:
        """Return the reply to a read that failed: an error, or all ones to a client that cannot take one."""
        if self._hello.version.minor == _RUST_MINOR and access.count <= self._limit:
            return proto.reply(ident, Command.REGION_READ, access.pack() + b"\xff" * access.count)
        return proto.error_reply(ident, Command.REGION_READ, _number(error))

    def _work_off(self, link: Link, commands: Commands) -> None:
        """Handle all that was received, and wait for the rest of a message that is there in part."""
        inbox, turn = self._inbox, self._turn
        while not inbox.empty():
            try:
                message = inbox.pop()
            except FramingError as error:
                link.send(proto.error_reply(error.id, error.command, _number(error)))
                raise
            if message is None:
                turn.idle = True
                inbox.receive()
                turn.idle = False
                continue
            self._handle(message, link, commands)
            if message.flags & proto.NO_REPLY or not inbox.empty():
                turn.step()
            else:
                self._throttle.last = turn

    def _handle(self, message: Received, link: Link, commands: Commands) -> None:
        began = time.monotonic() if self.observer is not None else 0.0
        given = len(message.fds)
        answer: bytes | Answer = b""
        failure: MdevError | None = None
        try:
            if message.flags & proto.TYPE_MASK == proto.TYPE_REPLY and link.deliver(message):
                return
            answer = execute(message, commands)
        except OSError as error:
            failure = wrap(error, proto.command_name(message.command))
        except Exception as error:
            log.exception("%s: the device failed at %s", self._name, proto.command_name(message.command))
            failure = wrap(error, proto.command_name(message.command))
        finally:
            if message.fds:
                close_all(message.fds)
        payload, fds = answer if isinstance(answer, Answer) else (answer, ())
        if message.flags & proto.NO_REPLY:
            pass
        elif failure is None:
            link.send(proto.reply_head(message.id, message.command, len(payload)), payload, fds)
        else:
            link.send(self._refusal(message, failure))
        if self.observer is not None:
            self._observe(message, given, payload, failure, began)

    def _refusal(self, message: Received, failure: MdevError) -> bytes:
        if message.command == Command.REGION_READ:
            with contextlib.suppress(MdevError):
                return self._failed_read(message.id, proto.parse_region_read(message.payload), failure)
        return proto.error_reply(message.id, message.command, _number(failure))

    def _observe(self, message: Received, fds: int, payload: bytes, failure: MdevError | None, began: float) -> None:
        exchange = Exchange(
            command=message.command,
            posted=bool(message.flags & proto.NO_REPLY),
            request=bytes(message.payload),
            fds=fds,
            errno=_number(failure) if failure is not None else 0,
            reason=str(failure or ""),
            reply=payload,
            began=began,
            seconds=time.monotonic() - began,
        )
        observer = self.observer
        try:
            if observer is not None:
                observer(exchange)
        except Exception:
            log.exception("%s: the observer failed", self._name)

    @contextlib.contextmanager
    def _device(self, doing: str) -> Iterator[None]:
        """Turn whatever the device raises into an `MdevError`; what is no OSError is a bug of the device, and logged."""
        try:
            yield
        except OSError as error:
            raise wrap(error, f"the device failed to {doing}") from error
        except Exception as error:
            log.exception("%s: the device failed to %s", self._name, doing)
            raise wrap(error, f"the device failed to {doing}") from error


#: Bytes of a whole REGION_READ.
_READ_SIZE: Final = proto.READ.size
_unpack_access: Final = proto.READ.unpack_from
_pack_access: Final = proto.READ.pack


def execute(message: Received, commands: Commands) -> bytes | Answer:
    """Carry out a command; MdevError EINVAL for what is none, else what the device raises. Who owns descriptors: see `Commands`."""
    if message.flags & ~proto.NO_REPLY:
        raise MdevError(errno.EINVAL, f"flags {message.flags:#x} are not those of a command")
    if not message.complete:
        raise MdevError(errno.EINVAL, f"a message carries more than {proto.MAX_MSG_FDS} descriptors, or ours ran out")
    handler = commands.table[message.command] if message.command < len(commands.table) else None
    if handler is None:
        raise MdevError(errno.EINVAL, f"{proto.command_name(message.command)} is not for the client to send")
    return handler(message.payload, message.fds)


def _number(error: OSError) -> int:
    """Return an errno the wire can carry."""
    number = error.errno or 0
    return number if 0 < number < 1 << 32 else errno.EIO
