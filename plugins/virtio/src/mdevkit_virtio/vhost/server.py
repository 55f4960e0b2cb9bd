"""A vhost-user backend: one device at one socket, one client at a time.

A server has one thread, which waits for everything at once: connections, its client's messages, kicks of a device that cannot
wait for them itself, what the device has to tell, and what other threads want done. It never waits for a client, and it
alone calls the device; the traffic is on the device's own threads.

Threads: all methods from any thread, except from inside a call of the device's (EDEADLK).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.peers import Client

from mdevkit_virtio.memory import DirtyLog
from mdevkit_virtio.ops import DeviceId, VirtioOps
from mdevkit_virtio.vhost.backend import Backend
from mdevkit_virtio.vhost.features import Traits
from mdevkit_virtio.vhost.session import Observer, Session
from mdevkit_virtio.vhost.sources import Source

log = logging.getLogger("mdevkit.virtio")

#: Seconds the device may take for a call; only one stuck in its own code takes longer.
END_TIMEOUT: Final = 5.0
#: Seconds after which a thread that does not end may be held up by its client.
PATIENCE: Final = 0.2


class VhostUserServer:
    """Serves `ops` to whoever `source` brings. `name` is for logs, errors and thread names."""

    def __init__(self, ops: VirtioOps, source: Source, name: str) -> None:
        self.ops: Final = ops
        self.source: Final = source
        self.name: Final = name
        self._traits: Traits | None = None
        # Guards what follows; held for a few statements, never over a call into the device or a wait.
        self._lock: Final = threading.Lock()
        self._session: Session | None = None
        self._observer: Observer | None = None
        self._leaving = False
        self._closing = False
        self._suspended = False
        self._changed = False
        self._posted: Final[deque[tuple[Callable[[], None], Future[None]]]] = deque()
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def examine(self) -> None:
        """Find out what the device is; before `start`.

        ENOTSUP for one that is no network device, ENODEV for one without a queue pair, and what the device raises.
        """
        kind = self.ops.get_device_id()
        if kind != DeviceId.NET:
            raise MdevError(errno.ENOTSUP, f"{self.name} is virtio device {kind}; vhost_mdev serves network devices (1)", self)
        traits = Traits.of(self.ops, logs=self._can_log())
        if not traits.queues:
            raise MdevError(errno.ENODEV, f"{self.name} has no queue pair", self)
        self._traits = traits

    def start(self) -> None:
        """Begin to serve; once. What the source raises for its path; EALREADY when started before, ENOTCONN before `examine`."""
        _ = self.traits
        with self._lock:
            if self._thread is not None:
                raise MdevError(errno.EALREADY, f"{self.name} has been served at {self.source.path} already", self)
            with contextlib.ExitStack() as undo:
                self.source.open()
                undo.callback(self.source.close)
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                undo.callback(self._close_wake)
                thread = threading.Thread(target=self._run, name=f"{self.name} vhost", daemon=True)
                thread.start()
                self._thread = thread
                undo.pop_all()

    @property
    def traits(self) -> Traits:
        """What the device is to frontends; ENOTCONN before `examine`."""
        if self._traits is None:
            raise MdevError(errno.ENOTCONN, f"{self.name} has not been examined", self)
        return self._traits

    @property
    def client(self) -> Client | None:
        """Who uses the device; None while nobody does."""
        session = self._session
        return session.client if session is not None and not session.done.is_set() else None

    @property
    def observer(self) -> Observer | None:
        """Called after each message of a client; None costs nothing. May be set at any time."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        with self._lock:
            self._observer = observer
            if self._session is not None:
                self._session.observer = observer

    def let_go(self, timeout: float, force: bool = False) -> None:
        """Get the client off the device: wait up to `timeout` seconds for it to go; vhost-user has no way to ask.

        If it is still there then, `force` breaks the connection; otherwise MdevError EBUSY names its process and serving goes on.
        While this runs, and after it has succeeded, new clients are turned away. ETIMEDOUT if the device does not come back from
        its own code.
        """
        self._refuse_own_thread()
        with self._lock:
            self._leaving = True
            session = self._session
        try:
            if session is None or session.done.wait(timeout):
                return
            if not force:
                raise MdevError(errno.EBUSY, f"{self.name} is in use by {session.client}", self)
            self._do(lambda: self._end(session))
        except BaseException:
            self._leaving = False
            self._notify()
            raise

    def suspend(self) -> None:
        """Stop the device's queues; its client may go on talking, and new ones may come. ETIMEDOUT as `let_go`."""
        self._refuse_own_thread()
        self._do(lambda: self._set_suspended(True))

    def resume(self) -> None:
        """Go on where `suspend` stopped."""
        self._refuse_own_thread()
        self._do(lambda: self._set_suspended(False))

    def close(self) -> None:
        """End everything: socket, connection, thread. A client is cut off; closing twice is harmless.

        ETIMEDOUT if the device does not come back from its own code; then its thread is all that is left.
        """
        self._refuse_own_thread()
        with self._lock:
            self._closing = True
            thread = self._thread
        if thread is None:
            return
        self._notify()
        self._join(thread)
        if thread.is_alive():
            raise self._stuck()

    # -- from any thread ------------------------------------------------------------------------------------------------

    def _can_log(self) -> bool:
        """Try it: a device tells with a real log only."""
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, 1)
            return self.ops.set_log(DirtyLog(fd, 1))
        finally:
            os.close(fd)
            self.ops.set_log(None)

    def _join(self, thread: threading.Thread) -> None:
        """Wait for the server's thread; free it from a client's eventfd that has been made to block."""
        deadline = time.monotonic() + END_TIMEOUT
        thread.join(PATIENCE)
        while thread.is_alive() and time.monotonic() < deadline:
            session = self._session
            for vring in session.backend.vrings if session is not None else ():
                vring.drain()
            thread.join(PATIENCE)

    def _do(self, action: Callable[[], None]) -> None:
        """Have something done on the server's thread; ETIMEDOUT if that does not get to it, nothing when there is none."""
        done: Future[None] = Future()
        with self._lock:
            if self._wake < 0:
                return
            self._posted.append((action, done))
        self._notify()
        try:
            done.result(END_TIMEOUT)
        except TimeoutError:
            raise self._stuck() from None

    def _stuck(self) -> MdevError:
        return MdevError(errno.ETIMEDOUT, f"{self.name} does not come back from its own code", self)

    def _refuse_own_thread(self) -> None:
        if self._thread is threading.current_thread():
            raise MdevError(errno.EDEADLK, f"{self.name} cannot do this to itself", self)

    def _notify(self) -> None:
        """Wake the server's thread."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _on_change(self) -> None:
        """Note that the device has something to tell; on any thread of its own."""
        self._changed = True
        self._notify()

    def _close_wake(self) -> None:
        os.close(self._wake)
        self._wake = -1

    # -- the server's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._once(self._wait())
        except Exception:
            log.exception("%s: the server failed", self.name)
        finally:
            if self._session is not None:
                self._end(self._session)
            self.source.close()
            with self._lock:
                self._close_wake()
                left = list(self._posted)
            for _, done in left:
                done.set_result(None)

    def _wait(self) -> Collection[int]:
        """Wait for something to happen; return the descriptors that are ready."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        session = self._session
        if session is not None:
            poll.register(session, select.POLLIN)
            for fd in session.backend.kicks:
                poll.register(fd, select.POLLIN)
        for fd in self.source.watched(busy=session is not None):
            poll.register(fd, select.POLLIN)
        seconds = None if self._leaving else self.source.patience(busy=session is not None)
        ready = dict(poll.poll(None if seconds is None else math.ceil(seconds * 1000)))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def _once(self, ready: Collection[int]) -> None:
        while self._posted:
            self._execute(*self._posted.popleft())
        if self._session is not None:
            self._serve(self._session, ready)
        session = self._session
        if session is not None and session.hung_up():
            # Whoever comes now is not turned away because of a client that has gone.
            return
        sock = self.source.take(ready, refusing=session is not None or self._leaving)
        if sock is not None:
            self._begin(sock)

    @staticmethod
    def _execute(action: Callable[[], None], done: Future[None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  # it belongs to the thread that waits
            done.set_exception(error)
        else:
            done.set_result(None)

    def _serve(self, session: Session, ready: Collection[int]) -> None:
        try:
            if self._changed:
                self._changed = False
                session.backend.notify()
            for fd, vring in session.backend.kicks.items():
                if fd in ready:
                    session.backend.kicked(vring)
            if session.fileno() in ready:
                session.work()
        except ConnectionError:
            self._end(session)
        except OSError as error:
            log.warning("%s: the connection of %s ends: %s", self.name, session.client, error)
            self._end(session)
        except Exception:
            log.exception("%s: serving %s failed", self.name, session.client)
            self._end(session)

    def _begin(self, sock: socket.socket) -> None:
        session = Session(sock, Backend(self.ops, self.traits, self._on_change), self.name)
        with self._lock:
            if self._leaving:
                sock.close()
                return
            session.observer = self._observer
            self._session = session
        self._began = time.monotonic()
        try:
            session.open()
            if self._suspended:
                session.backend.suspend()
        except MdevError as error:
            log.warning("%s: %s cannot be served: %s", self.name, session.client, error)
            self._end(session)

    def _end(self, session: Session) -> None:
        if session.done.is_set():
            return
        session.close()
        with self._lock:
            self._session = None
        self.source.ended(time.monotonic() - self._began)

    def _set_suspended(self, suspended: bool) -> None:
        self._suspended = suspended
        if self._session is not None:
            (self._session.backend.suspend if suspended else self._session.backend.resume)()
