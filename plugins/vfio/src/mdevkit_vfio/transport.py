"""How a bound device gets to its client: by itself, or through a front that outlives this process.

`Transport` is what the driver knows of either. `mdevkit_vfio.server.VfioUserServer` listens itself, which is the fastest way;
`ParkedServer` has a front (`mdevkit_vfio.front`) do so, for devices that shall survive this process. Which one a device gets is
for whoever runs the process to say, as hosts of the service do: with $MDEVKIT_FRONT set to the path of a control socket, in a
folder of this user's that stays the same when the process is started again, devices that can be parked are.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeGuard

import mdevkit
from mdevkit.errors import MdevError, wrap
from mdevkit.peers import Client
from mdevkit.sockets import Listen, listen_at, socket_identity, unlink_socket

import mdevkit_vfio
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.front.control import Control, Note
from mdevkit_vfio.front.session import Greeting, ParkableOps, ParkedSession
from mdevkit_vfio.front.wire import USUAL_LIMITS, Limits, Private, pack
from mdevkit_vfio.ops import VfioOps
from mdevkit_vfio.server import DRAIN_INTERVAL, VfioUserServer
from mdevkit_vfio.session import Observer
from mdevkit_vfio.throttle import Throttle

log = logging.getLogger("mdevkit.vfio")

#: Names the control socket of the porter.
VARIABLE: Final = "MDEVKIT_FRONT"
#: Seconds a porter or a front gets to answer.
_LIMIT: Final = 5.0
#: Seconds between attempts to register, and how many there are.
_RETRY: Final = 0.005
_ATTEMPTS: Final = 200
#: Seconds between attempts to register with another porter.
_REJOIN: Final = 1.0
#: Started without the site's packages: a porter needs two folders, and starts in a third of the time.
_PORTER: Final = "import sys; sys.path += sys.argv[3:]; from mdevkit_vfio.front.porter import main; main()"


class Transport(Protocol):
    """What serves one device to one client at a time. Any thread but the session's may call."""

    @property
    def path(self) -> Path:
        """Where the device is served."""
        ...

    @property
    def client(self) -> Client | None:
        """Who uses it; None while nobody does."""
        ...

    @property
    def failure(self) -> MdevError | None:
        """Why nobody is served although it has been started; None while all is well."""
        ...

    @property
    def observer(self) -> Observer | None:
        """Called after each command of a client."""
        ...

    @observer.setter
    def observer(self, observer: Observer | None) -> None: ...

    def start(self) -> None:
        """Begin to serve; MdevError for a path that cannot be used."""
        ...

    def let_go(self, timeout: float, force: bool = False) -> None:
        """Get the client off the device: EBUSY if it does not go and is not forced to."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


def can_be_parked(ops: VfioOps) -> TypeGuard[ParkableOps]:
    """Return whether a device can go on in another process; most of those that are a `PciDevice` and can migrate can."""
    return bool(getattr(ops, "parkable", False))


class Registration:
    """What a process has from a porter while it serves a device: a connection, and a copy of the listening socket."""

    def __init__(self, control: Control, listener: socket.socket, path: Path) -> None:
        self.control: Final = control
        self._listener: Final = listener
        self._path: Final = str(path)
        self._identity: Final = socket_identity(self._path)

    def listen(self) -> socket.socket | None:
        """Return the listening socket once more for another porter; None when the last one has taken its path away."""
        return self._listener.dup() if socket_identity(self._path) == self._identity else None

    def close_copy(self) -> None:
        """Forget the socket, which another registration has."""
        self._listener.close()

    def close(self) -> None:
        """Give the device up; nothing is left of its socket, its front and their client afterwards."""
        if self.control.send({"op": "remove"}):
            while (note := self.control.receive()) is not None:
                close_all(note.fds)
        else:
            unlink_socket(self._listener, self._identity, self._path)
        self._listener.close()
        self.control.close()


class Fronts:
    """The porter whose control socket is at `path`; one is started when it is needed. Any thread may call."""

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        self._starting: Final = threading.Lock()

    def register(self, name: str, path: Path, listen: Listen, limits: Limits) -> Registration:
        """Become the process that serves the device `name` at `path`, until the registration is closed.

        `listen` makes the socket if the porter has none from an earlier process. EADDRINUSE when another process goes on serving
        the device, EIO with the reason when it has failed, ECONNREFUSED when no porter can be had, and what `listen` raises.
        """
        facts = {"op": "serve", "name": name, "path": str(path), "limits": limits}
        state = ""
        for _ in range(_ATTEMPTS):
            control = self._connect()
            try:
                state, fds = self._registered(control, facts, listen)
            except BaseException:
                control.close()
                raise
            if fds:
                return Registration(control, socket.socket(fileno=fds[0]), path)
            # The last process is still being torn down, or the porter: soon there will be another answer.
            control.close()
            time.sleep(_RETRY)
        if state == "busy":
            raise MdevError(errno.EADDRINUSE, f"{name} is served by another process", path)
        raise MdevError(errno.ECONNREFUSED, f"no porter answers at {self._path}", self._path)

    def _registered(self, control: Control, facts: dict[str, Any], listen: Listen) -> tuple[str, list[int]]:
        """Return what the porter says, and with "served" the listening socket."""
        note = self._ask(control, facts)
        if note.facts["state"] == "unknown":
            with listen(facts["path"]) as listener:
                note = self._ask(control, facts, [listener.fileno()])
        if note.facts["state"] == "failed":
            raise MdevError(errno.EIO, f"{facts['name']} has failed: {note.facts['reason']}", facts["path"])
        return note.facts["state"], note.fds

    @staticmethod
    def _ask(control: Control, facts: dict[str, Any], fds: Sequence[int] = ()) -> Note:
        control.send(facts, fds)
        return control.receive() or Note({"state": "gone"}, [])

    def _connect(self) -> Control:
        """Return a connection to the porter, started if there is none."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(_LIMIT), 0))
        try:
            with self._starting:
                try:
                    sock.connect(os.fsencode(self._path))
                except (FileNotFoundError, ConnectionRefusedError):
                    self._start()
                    sock.connect(os.fsencode(self._path))
        except OSError as error:
            sock.close()
            raise wrap(error, f"cannot connect to the porter at {self._path}", self._path) from error
        return Control(sock)

    def _start(self) -> None:
        """Start a porter, which is nobody's child soon and in a session of its own. Its socket is there at once."""
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(os.fsencode(self._path))
            listener.listen(128)
            roots = [str(Path(module.__file__).parents[1]) for module in (mdevkit, mdevkit_vfio) if module.__file__]
            command = [sys.executable, "-S", "-E", "-P", "-c", _PORTER, str(listener.fileno()), str(self._path), *roots]
            process = subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        # Somebody has to take its exit status if we live longer.
        threading.Thread(target=process.wait, name="porter", daemon=True).start()


class ParkedServer(VfioUserServer):
    """Serves `ops` through a front of `fronts`. Its client survives this process; `close` ends it all the same."""

    def __init__(
        self,
        ops: ParkableOps,
        path: Path,
        name: str,
        *,
        fronts: Fronts,
        listen: Listen = listen_at,
        throttle: Throttle | None = None,
        observer: Observer | None = None,
        limits: Limits = USUAL_LIMITS,
    ) -> None:
        super().__init__(ops, path, name, listen=listen, throttle=throttle, observer=observer)
        self._parkable: Final = ops
        self._fronts: Final = fronts
        self._limits: Final = limits
        #: A front's connection that waits until the device is free.
        self._next: socket.socket | None = None

    def start(self) -> None:
        """See `VfioUserServer.start`; a client that has been there before this process gets its device back soon after.

        Raises what `Fronts.register` raises.
        """
        with self._lock:
            if self._thread is not None:
                raise MdevError(errno.EALREADY, f"{self.name} has been served at {self.path} already", self)
            with contextlib.ExitStack() as undo:
                registration = self._fronts.register(self.name, self.path, self._listen, self._limits)
                undo.callback(registration.close)
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                undo.callback(os.close, self._wake)
                thread = threading.Thread(target=self._attend, args=(registration,), name=f"{self.name} front", daemon=True)
                thread.start()
                self._thread = thread
                undo.pop_all()

    # -- the thread that listens to the porter ----------------------------------------------------------------------

    def _attend(self, registration: Registration) -> None:
        try:
            while not self._closing:
                if not self._step(registration.control):
                    registration = self._rejoin(registration)
        except Exception as error:
            log.exception("%s: the server failed", self.name)
            self.failure = self._ended_by(error)
        finally:
            registration.close()
            if self._next is not None:
                self._next.close()
            self._end_session()
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def _step(self, control: Control) -> bool:
        """Wait for one event, and do what it asks for; False when the porter has died."""
        session = self._session
        ending = session is not None and session.hung_up()
        ready = self._wait(control, session.fileno() if session is not None and not ending else -1, ending=ending)
        if session is not None and session.done.is_set():
            self._reap(session)
        elif session is not None and ending:
            session.drain()
        if control.fileno() in ready and not self._hear(control):
            return False
        if self._next is not None and self._session is None:
            sock, self._next = self._next, None
            self._greet(sock)
        return True

    def _wait(self, control: Control, attached: int, *, ending: bool) -> dict[int, int]:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(control.fileno(), select.POLLIN)
        if attached >= 0:
            poll.register(attached, select.POLLRDHUP)
        ready = dict(poll.poll(DRAIN_INTERVAL * 1000 if ending else None))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def _hear(self, control: Control) -> bool:
        """Take what the porter says; False when it has died."""
        note = control.receive()
        if note is None:
            return False
        if note.facts["op"] == "failed":
            reason = note.facts["reason"]
            self.failure = MdevError(errno.EIO, f"{self.name} has failed: {reason}", self) if reason else None
        elif note.fds:
            if self._next is not None:
                self._next.close()
            self._next = socket.socket(fileno=note.fds[0])
        return True

    def _rejoin(self, old: Registration) -> Registration:
        """Register with another porter, until it works out or the server is closed.

        Whoever connects meanwhile waits in the socket, which is the same. A client that is there keeps its front, and the
        device as long as this process lives: a front without a porter cannot get another one.
        """
        log.error("%s: the porter has died; a client that is there has its device while this process lives", self.name)
        old.control.close()
        while not self._closing:
            try:
                new = self._fronts.register(self.name, self.path, lambda path: old.listen() or self._listen(path), self._limits)
            except MdevError as error:
                self.failure = error
                self._pause(_REJOIN)
            else:
                self.failure = None
                old.close_copy()
                return new
        return old

    def _pause(self, seconds: float) -> None:
        """Wait, unless the server is closed meanwhile."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(seconds * 1000):
            os.eventfd_read(self._wake)

    def _greet(self, sock: socket.socket) -> None:
        """Begin a session, unless nobody is served any more."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(_LIMIT), 0))
        try:
            greeting = Greeting(sock)
        except OSError as error:
            log.warning("%s: a front has said nothing of use: %s", self.name, error)
            sock.close()
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 0))
        with self._lock:
            if self._leaving or self._closing:
                greeting.close()
                with contextlib.suppress(OSError):
                    sock.send(pack(Private.HANGUP))
                sock.close()
                return
            session = ParkedSession(
                self._parkable,
                sock,
                greeting,
                name=self.name,
                throttle=self._throttle,
                observer=self._observer,
                ended=self._notify,
            )
            self._session = session
            try:
                session.start()
            except MdevError as error:
                self._session = None
                log.warning("%s", error)
                greeting.close()
