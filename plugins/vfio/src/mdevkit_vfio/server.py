"""A vfio-user server: one device at one socket, one client at a time.

Each server has a thread that accepts connections and hears them out until they have said VERSION; the one whose turn it
is gets a `Session` with a thread of its own, the others an error. The accepting thread never waits for a client, and is
therefore the one that frees a session's thread which a client has got stuck.

Threads: `start`, `let_go` and `close` from any thread but the session's; attributes from any.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError, describe
from mdevkit.peers import Client
from mdevkit.sockets import Listen, listen_at, socket_identity, unlink_socket

from mdevkit_vfio.ops import VfioOps
from mdevkit_vfio.reception import Newcomer, Reception
from mdevkit_vfio.session import Exchange, Observer, Session
from mdevkit_vfio.throttle import Throttle

__all__ = ["Exchange", "Observer", "Throttle", "VfioUserServer"]

log = logging.getLogger("mdevkit.vfio")

#: Seconds between two attempts to free a session's thread whose client is gone.
DRAIN_INTERVAL: Final = 0.02
#: Seconds between two requests to let go; the kernel's vfio_unregister_group_dev() takes ten times as long.
ASK_INTERVAL: Final = 1.0
#: Seconds a session may take to end once its connection is broken; only a device stuck in its own code takes longer.
END_TIMEOUT: Final = 5.0


class VfioUserServer:
    """Serves `ops` at `path`, with a socket that `listen` makes. `name` is for logs, errors and thread names.

    Servers of one process share a `Throttle`, so that a client that floods its device does not slow down the others'.
    """

    def __init__(
        self,
        ops: VfioOps,
        path: Path,
        name: str,
        *,
        listen: Listen = listen_at,
        throttle: Throttle | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.ops: Final = ops
        self.path: Final = path
        self.name: Final = name
        #: Why nobody is served although it has been started; set on the server's own thread.
        self.failure: MdevError | None = None
        self._listen: Final = listen
        self._throttle: Final = throttle or Throttle()
        # Guards what follows; held for a few statements, never over a call into the device or a wait for a client. Only `start`
        # holds it for longer, over all it does (`listen` may ask another process), and whoever ends the server meanwhile waits.
        self._lock: Final = threading.Lock()
        self._observer = observer
        self._session: Session | None = None
        self._leaving = False
        self._closing = False
        self._stuck: Session | None = None
        self._asker: threading.Thread | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, and serve whoever comes. A server is started once.

        Raises what `listen` does, in this process as `mdevkit.sockets.listen_at`: ENAMETOOLONG (a path has at most 107 bytes),
        ENOENT, ENOTDIR or EACCES for its folder, EADDRINUSE where another server listens or something else is in the way;
        EALREADY when started before.
        """
        with self._lock:
            if self._thread is not None:
                raise MdevError(errno.EALREADY, f"{self.name} has been served at {self.path} already", self)
            with contextlib.ExitStack() as undo:
                path = str(self.path)
                listener = self._listen(path)
                give_back = partial(unlink_socket, listener, socket_identity(path), path)
                undo.callback(give_back)
                listener.setblocking(False)
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                undo.callback(os.close, self._wake)
                thread = threading.Thread(target=self._run, args=(listener, give_back), name=f"{self.name} accept", daemon=True)
                thread.start()
                self._thread = thread
                undo.pop_all()

    @property
    def client(self) -> Client | None:
        """Who uses the device; None while nobody does."""
        session = self._session
        return session.client if session is not None and not session.done.is_set() else None

    @property
    def observer(self) -> Observer | None:
        """Called after each command of a client; None costs nothing. May be set at any time."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        with self._lock:
            self._observer = observer
            if self._session is not None:
                self._session.observer = observer

    def let_go(self, timeout: float, force: bool = False) -> None:
        """Get the client off the device: ask it through the REQ interrupt, wait up to `timeout` seconds.

        If it is still there then, `force` breaks the connection; otherwise MdevError EBUSY names its process and serving
        goes on. While this runs, and after it has succeeded, new clients are refused with ENODEV. ETIMEDOUT if the
        device does not come back from its own code; EDEADLK on the session's own thread.
        """
        with self._lock:
            self._leaving = True
            session = self._session
        try:
            if session is not None:
                self._refuse_own_thread(session)
                self._get_off(session, timeout, force)
        except BaseException:
            self._leaving = False
            raise

    def close(self) -> None:
        """End everything: socket, connection, threads. A client is cut off; closing twice is harmless.

        EDEADLK on the session's own thread. ETIMEDOUT if the device does not come back from its own code; then its
        thread is all that is left.
        """
        with self._lock:
            session, thread = self._session, self._thread
            if session is not None:
                self._refuse_own_thread(session)
            self._closing = True
        if thread is None:
            return
        self._notify()
        thread.join()
        if self._stuck is not None and not self._stuck.done.is_set():
            raise MdevError(errno.ETIMEDOUT, f"{self.name} does not come back from its own code", self)

    def _refuse_own_thread(self, session: Session) -> None:
        if session.current:
            raise MdevError(errno.EDEADLK, f"a request of its own client cannot end {self.name}", self)

    # -- getting rid of a client ------------------------------------------------------------------------------------

    def _get_off(self, session: Session, timeout: float, force: bool) -> None:
        if self._asked(session, timeout):
            return
        if not force:
            raise MdevError(errno.EBUSY, f"{self.name} is in use by {session.client}", self)
        session.shut()
        if not session.done.wait(END_TIMEOUT):
            raise MdevError(errno.ETIMEDOUT, f"{self.name} does not come back from its own code", self)

    def _asked(self, session: Session, timeout: float) -> bool:
        """Ask the client to go, again and again; True once it has gone."""
        deadline = time.monotonic() + timeout
        count = 0
        while not session.done.is_set():
            left = deadline - time.monotonic()
            if count and left <= 0:
                return False
            if self._asker is None or not self._asker.is_alive():
                # On a thread of its own: the client can make the write to its eventfd block.
                self._asker = threading.Thread(target=self._ask, args=(session, count), name=f"{self.name} ask", daemon=True)
                self._asker.start()
            count += 1
            session.done.wait(max(0, min(left, ASK_INTERVAL)))
        return True

    def _ask(self, session: Session, count: int) -> None:
        try:
            self.ops.request(count)
        except Exception:
            if not session.done.is_set():
                log.exception("%s: the device failed to ask its client to let go", self.name)

    # -- the accepting thread ---------------------------------------------------------------------------------------

    def _run(self, listener: socket.socket, give_back: Callable[[], None]) -> None:
        reception = Reception(listener, self._wake)
        try:
            while not self._closing:
                self._once(reception)
        except Exception as error:
            log.exception("%s: the server failed", self.name)
            self.failure = self._ended_by(error)
        finally:
            give_back()
            reception.close()
            self._end_session()
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def _ended_by(self, error: Exception) -> MdevError:
        return MdevError(errno.EIO, f"{self.name} is not served any more: {describe(error)}", self)

    def _once(self, reception: Reception) -> None:
        """Wait for one event, and do what it asks for."""
        session = self._session
        ending = session is not None and session.hung_up()
        attached = session.fileno() if session is not None and not ending else -1
        reception.wait(attached, DRAIN_INTERVAL if ending else None)
        if session is not None and session.done.is_set():
            self._reap(session)
        elif session is not None and ending:
            session.drain()
        for newcomer in reception.ready:
            self._decide(reception, newcomer)

    def _decide(self, reception: Reception, newcomer: Newcomer) -> None:
        """Serve a newcomer, refuse it, or let it wait while its predecessor is on the way out."""
        with self._lock:
            session = self._session
            if self._leaving or self._closing:
                error = MdevError(errno.ENODEV, f"{self.name} is going away", self)
            elif session is None:
                self._begin(reception, newcomer)
                return
            elif session.hung_up():
                return
            else:
                error = MdevError(errno.EBUSY, f"{self.name} is in use by {session.client}", self)
        reception.refuse(newcomer, error)

    def _begin(self, reception: Reception, newcomer: Newcomer) -> None:
        assert newcomer.hello is not None
        session = Session(
            self.ops,
            reception.admit(newcomer),
            newcomer.hello,
            name=self.name,
            throttle=self._throttle,
            observer=self._observer,
            ended=self._notify,
        )
        # Known before it answers: whoever has its VERSION reply is the client.
        self._session = session
        try:
            session.start()
        except MdevError as error:
            self._session = None
            log.warning("%s", error)

    def _reap(self, session: Session) -> None:
        session.join()
        with self._lock:
            self._session = None

    def _end_session(self) -> None:
        """Break the connection, and free its thread from whatever the client has got it stuck in."""
        session = self._session
        if session is None:
            return
        session.shut()
        deadline = time.monotonic() + END_TIMEOUT
        while not session.done.wait(DRAIN_INTERVAL) and time.monotonic() < deadline:
            session.drain()
        if session.done.is_set():
            self._reap(session)
        else:
            self._stuck = session

    def _notify(self) -> None:
        """Wake the accepting thread."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
