"""A host: the process in which the parents of one host key live, with their devices.

It is forked from the zygote, in a session of its own, and outlives service and zygote: it listens at
``<runtime>/hosts/<key>.sock``, and a new service connects there. ``<key>.lock`` stays locked while it lives. Without devices and
without a service it ends by itself. What drivers keep alive over its death, such as the clients of VFIO devices, is reached at
``<key>.front``.

Threads: the main one accepts; each connection has one that sends events and several that take turns at reading: whoever has read a
request carries it out himself, while the next one reads on. So no request waits for a thread to wake up, and a vendor's slow create
holds up nobody's list.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import resource
import select
import signal
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError, wrap
from mdevkit.events import LaggedError, Subscription
from mdevkit.peers import credentials
from mdevkit.registry import Registry
from mdevkit.sockets import listen_at, socket_identity, unlink_socket

from mdevkit_service.broker import Broker
from mdevkit_service.hostops import HostOps
from mdevkit_service.opener import become
from mdevkit_service.scout import host_key, load_parents
from mdevkit_service.wire import Message, Reader, frame, send

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mdevkit.plugins import Catalog

log = logging.getLogger("mdevkit.host")

#: Seconds a host without devices waits for a service.
IDLE_LIMIT: Final = 5.0
#: Seconds a new host waits for one that is about to end.
_LOCK_LIMIT: Final = 5.0
#: The most requests of one service that are carried out at once. One more thread reads: they may wait for what it reads.
_WORKERS: Final = 64


def run(parent_socket: socket.socket, catalog: Catalog, arguments: dict[str, Any]) -> None:
    """Be the host `arguments` describes: key, plugins, files, whom to run as. Tells `parent_socket` when it listens."""
    # What ps and top show; at most 15 characters of it (prctl(2), PR_SET_NAME).
    Path("/proc/self/comm").write_text(f"mdev {arguments['key']}")
    become(arguments.get("user") or {})
    # Each device takes descriptors, and a thousand devices is a usual number.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _redirect(arguments["log"])
    # Drivers read it: where what shall outlive this process is kept, the same for every host of this key.
    os.environ["MDEVKIT_FRONT"] = arguments["front"]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, force=True)
    with _locked(arguments["lock"], arguments["key"]), _listening(arguments["socket"]) as listener:
        broker = Broker(arguments["folder"]) if arguments["brokered"] else None
        with Registry([broker] if broker else (), catalog=catalog) as registry:
            _load(registry, arguments)
            host = Host(registry, arguments["key"], listener, broker)
            send(parent_socket, {"ready": os.getpid()})
            parent_socket.close()
            host.serve()
        # All devices have been removed, so nothing is left that a next host could want.
        Path(arguments["front"]).unlink(missing_ok=True)


def _redirect(path: str) -> None:
    """Send what is printed to the log, and read nothing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    output, nothing = os.open(path, flags, 0o600), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)


@contextlib.contextmanager
def _locked(path: str, key: str) -> Iterator[None]:
    """Hold the host's lock with our process id and key in it; EEXIST when another host goes on holding it."""
    deadline = time.monotonic() + _LOCK_LIMIT
    while (fd := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise MdevError(errno.EEXIST, f"another host holds {path}", path) from None
        time.sleep(0.01)  # flock has no time limit of its own
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()} {key}\n".encode())
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        os.close(fd)


def _try_lock(path: str) -> int | None:
    """Return a descriptor of the locked file, None if it is locked or was replaced by the host that ended meanwhile."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(path)):  # noqa: PTH116  (what samestat takes)
            return fd
    except OSError as error:
        if not isinstance(error, BlockingIOError | FileNotFoundError):
            os.close(fd)
            raise
    os.close(fd)
    return None


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    # Whoever holds the lock owns the path: what is there is a dead host's.
    Path(path).unlink(missing_ok=True)
    listener = listen_at(path)
    identity = socket_identity(path)
    try:
        yield listener
    finally:
        unlink_socket(listener, identity, path)


def _load(registry: Registry, arguments: dict[str, Any]) -> None:
    """Register the wrappers, and of the plugins' parents those of this host; all errors are the caller's."""
    for wrapper in registry.catalog.find("mdevkit.wrappers"):
        try:
            registry.use(wrapper)
        except MdevError as error:
            log.error("%s", error)
    for name in arguments["plugins"]:
        for parent in load_parents(registry.catalog, name):
            if host_key(parent) == arguments["key"]:
                registry.register_parent(parent)


class Host:
    """Serves a registry to the service that connects."""

    def __init__(self, registry: Registry, key: str, listener: socket.socket, broker: Broker | None = None) -> None:
        self.key: Final = key
        #: Changes with every process of this key: the service tells by it whose event numbers it remembers.
        self.epoch: Final = os.urandom(8).hex()
        self.registry: Final = registry
        self.ops: Final = HostOps(registry, self.stop)
        self.broker: Final = broker
        self._listener: Final = listener
        self._connections: Final[set[Connection]] = set()
        self._idle_since = time.monotonic()
        self._stopping = os.eventfd(0)

    def stop(self) -> None:
        """End `serve`, from any thread."""
        os.eventfd_write(self._stopping, 1)

    def serve(self) -> None:
        """Accept services until told to stop, or until there is neither a device nor a service."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self.stop())
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._stopping, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(IDLE_LIMIT * 1000 / 2)]
            if self._stopping in ready or self._idle():
                break
            if self._listener.fileno() in ready:
                self._accept()
        for connection in list(self._connections):
            connection.close()

    def _idle(self) -> bool:
        if self._connections or self.registry.mdevs or self.ops.busy:
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since > IDLE_LIMIT

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        _, user, _ = credentials(sock)
        if user not in {0, os.getuid()}:
            log.error("user %d is not the service", user)
            sock.close()
            return
        self._connections.add(Connection(self, sock))

    def forget(self, connection: Connection) -> None:
        """Take note that a connection has ended."""
        self._connections.discard(connection)
        self._idle_since = time.monotonic()


class Connection:
    """One service."""

    def __init__(self, host: Host, sock: socket.socket) -> None:
        self._host: Final = host
        self._sock: Final = sock
        self._messages: Final = iter(Reader(sock))
        #: Held by the thread that reads.
        self._reading: Final = threading.Lock()
        self._counting: Final = threading.Lock()
        self._sending: Final = threading.Lock()
        #: Where the service is, read with the lock for sending; and what wakes us.
        self._events: Subscription | None = None
        self._alarm: Subscription | None = None
        self._workers = 0
        self._idle = 0
        #: Read while every worker was busy.
        self._queue: Final[deque[Message]] = deque()
        self._ended = False
        self._add_worker()

    def close(self) -> None:
        """End the connection, from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def send(self, message: Message | None = None) -> None:
        """Send what has happened, and then a message, in one go.

        A service that has gone misses nothing, since a new one asks for everything.
        """
        with self._sending, contextlib.suppress(OSError):
            happened = self._happened()
            frames = ([{"events": happened}] if happened else []) + ([message] if message is not None else [])
            if frames:
                self._sock.sendall(b"".join(frame(each) for each in frames))

    def _happened(self) -> list[Message]:
        """Return the events that have not been sent; the caller holds the lock for sending."""
        events = self._events
        batch: list[Message] = []
        while events is not None and events.position < self._host.registry.events.last:
            try:
                event = events.get()
            except LaggedError as error:
                batch.append({"lagged": error.missed})
                continue
            if event is None:
                break
            facts: Message = {"seq": event.seq, "action": str(event.action), "subject": event.subject, "time": event.time}
            batch.append({**facts, "env": dict(event.env)})
        return batch

    def _add_worker(self) -> None:
        self._workers += 1
        threading.Thread(target=self._work, name="request", daemon=True).start()

    def _work(self) -> None:
        """Read a request in our turn, let the next one read, and carry ours out; until the service has gone."""
        while message := self._next():
            self._host.ops.begin()
            try:
                self._carry_out(message)
            finally:
                self._host.ops.end()

    def _next(self) -> Message | None:
        """Return the next request, in our turn; None at the end."""
        with self._counting:
            if self._queue:
                return self._queue.popleft()
            self._idle += 1
        with self._reading:
            while (message := None if self._ended else self._read()) is not None:
                if self._may_leave(message):
                    return message
            if not self._ended:
                self._ended = True
                self._end()
            return None

    def _may_leave(self, message: Message) -> bool:
        """Let the reader carry out what it has read if another thread reads on; else leave that to whoever is ready first."""
        with self._counting:
            if self._idle == 1 and self._workers > _WORKERS:
                self._queue.append(message)
                return False
            self._idle -= 1
            if not self._idle:
                self._add_worker()
            return True

    def _read(self) -> Message | None:
        """Return the next message that is a request; others are dealt with at once."""
        try:
            for message, fds in self._messages:
                if "answer" in message and self._host.broker:
                    self._host.broker.answered(message, fds)
                elif message["op"] == "hello":
                    self._hello(message)
                else:
                    return message
        except Exception:
            log.exception("the connection to the service broke")
        return None

    def _end(self) -> None:
        if self._alarm:
            self._alarm.close()
        if self._host.broker:
            self._host.broker.disconnected(self)
        self._host.forget(self)
        with self._sending:
            self._sock.close()

    def _carry_out(self, message: Message) -> None:
        with self._host.broker.acting(self, message["id"]) if self._host.broker else contextlib.nullcontext():
            self.send(answer(self._host.ops, message))

    def _hello(self, message: Message) -> None:
        """Introduce ourselves, then send every event after the one the service saw last."""
        host, after = self._host, message["args"]["seen"].get(self._host.epoch, 0)
        events = host.registry.events
        if host.broker:
            host.broker.connected(self)
        facts = {"key": host.key, "epoch": host.epoch, "pid": os.getpid(), "parents": host.ops.parents()}
        self.send({"id": message["id"], "result": facts})
        self._events = events.subscribe(min(after, events.last))
        self._alarm = events.subscribe(self._events.position)
        threading.Thread(target=self._pump, args=(self._alarm, self._events), name="events", daemon=True).start()

    def _pump(self, alarm: Subscription, events: Subscription) -> None:
        """Send what happens by itself; what a request has caused goes with its answer, and is no news here."""
        while not alarm.closed:
            with contextlib.suppress(LaggedError):
                if alarm.get() is None:
                    return
            self.send()
            alarm.position = max(alarm.position, events.position)


def answer(ops: HostOps, message: Message) -> Message:
    """Carry out a request and return the answer to it; a plugin's exceptions come as EIO with their names."""
    try:
        return {"id": message["id"], "result": ops.call(message["op"], message.get("args", {}))}
    except MdevError as error:
        failure = error
    except Exception as error:
        log.exception("a bug in %s", message["op"])
        failure = wrap(error, message["op"])
    return {"id": message["id"], "error": {"errno": failure.errno, "message": str(failure)}}
