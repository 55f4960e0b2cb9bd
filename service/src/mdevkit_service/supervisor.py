"""Keeps one host process running: finds it, starts it, restarts it with back-off. One task per host, on the event loop.

What is done about the host's devices is the `Keeper`'s business, which is told of everything.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from mdevkit.errors import MdevError
from mdevkit.sockets import is_stale

from mdevkit_service.link import HostDiedError, Link

if TYPE_CHECKING:
    from mdevkit_service.forker import Child, Forker
    from mdevkit_service.journal import Journal
    from mdevkit_service.records import Peer
    from mdevkit_service.settings import Settings
    from mdevkit_service.wire import Message

log = logging.getLogger("mdevkit.service")

#: Seconds a plugin gets to be loaded by its host.
START_LIMIT: Final = 30.0
#: Seconds between restarts: none, then doubling from the first to the last. A guest whose device is away gets errors after 4.5 s.
BACK_OFF: Final = (0.1, 2.0)
#: A host that has served for so many seconds gets its next restart without delay: guests wait for it.
_RECOVERED: Final = 0.25
#: Seconds a request waits for a host that is being started.
_PATIENCE: Final = 10.0


class Keeper(Protocol):
    """Who keeps the devices of hosts."""

    async def connected(self, host: HostProcess, link: Link) -> None:
        """Make the host's devices and the records agree; requests to the host wait meanwhile."""

    def running(self, host: HostProcess) -> None:
        """Take note that a host takes requests."""

    def died(self, host: HostProcess, reason: str, about: list[str]) -> None:
        """Take note of a host's death, during requests `about` these devices."""

    def happened(self, host: HostProcess, message: Message) -> None:
        """Take note of events, or of a number of lost ones."""

    async def opened(self, host: HostProcess, uuid: str, path: str, peer: Peer | None) -> int:
        """Return a descriptor that listens at `path` for one of the host's devices; `peer` names paths for it just now.

        The host may ask anything: EPERM for a path that nobody who may use it has named.
        """


class HostProcess:
    """The host of one key."""

    def __init__(self, key: str, settings: Settings, forker: Forker, journal: Journal, keeper: Keeper) -> None:
        self.key: Final = key
        #: Entry points of the plugins that bring its parents.
        self.plugins: list[str] = []
        #: Its parents by name, as last told, without what changes.
        self.parents: dict[str, dict[str, Any]] = {}
        #: Devices and parents in it that are suspended, and shall be in its successor.
        self.suspended: set[str] = set()
        #: starting, running, failed.
        self.state = "starting"
        self.error: str | None = None
        self.restarts = 0
        self.epoch = ""
        self._settings: Final = settings
        self._forker: Final = forker
        self._journal: Final = journal
        self._keeper: Final = keeper
        self._link: Link | None = None
        self._child: Child | None = None
        self._delay = 0.0
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._helpers: Final[set[asyncio.Task[None]]] = set()

    @property
    def pid(self) -> int | None:
        """Its process, when there is one."""
        return self._link.pid if self._link is not None else None

    def start(self) -> None:
        """Begin to look after it."""
        self._task = asyncio.create_task(self._run())

    async def close(self, *, stop: bool) -> None:
        """Look after it no longer; with `stop`, end the process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._link is not None:
            if stop:
                await self._stop(self._link)
            self._link.close()
        if self.state == "starting":
            self._turn("failed", "it was ended")

    async def _stop(self, link: Link) -> None:
        try:
            with suppress(HostDiedError):
                await asyncio.wait_for(link.call("stop"), _PATIENCE)
            await asyncio.wait_for(self._lost.wait(), _PATIENCE)
        except (TimeoutError, MdevError) as error:
            log.warning("host %s does not stop: %s", self.key, error)

    async def settled(self) -> None:
        """Wait until the host runs, or its start has failed."""
        while self.state == "starting":
            await self._changed.wait()

    async def call(self, op: str, *, about: str = "", peer: Peer | None = None, **arguments: Any) -> Any:
        """Have the host carry out an operation: EAGAIN while it starts, EIO when that failed, HostDiedError when it dies of it."""
        if self.state != "running":
            await self._wait_settled()
        if self._link is None or self.state != "running":
            raise MdevError(errno.EIO, f"host {self.key} does not run: {self.error}", self.key)
        return await self._link.call(op, about=about, peer=peer, **arguments)

    async def note_suspended(self) -> None:
        """Find out what is suspended now, after an operation that may have failed half-way. A host older than us cannot tell."""
        with suppress(MdevError):
            told = await self.call("suspended")
            self.suspended = {name for name in told if isinstance(name, str)}

    async def _wait_settled(self) -> None:
        try:
            await asyncio.wait_for(self.settled(), _PATIENCE)
        except TimeoutError:
            raise MdevError(errno.EAGAIN, f"host {self.key} is still starting; try again", self.key) from None

    # -- the task ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await self._bring_up()
                self._turn("running")
                self._keeper.running(self)
                await self._serve()
            except HostDiedError:
                log.error("host %s died while its devices were made", self.key)
            except MdevError as error:
                self._give_up(str(error))
            await asyncio.sleep(self._delay)

    async def _serve(self) -> None:
        began = time.monotonic()
        await self._lost.wait()
        if time.monotonic() - began > _RECOVERED:
            self._delay = 0.0

    def _turn(self, state: str, error: str | None = None) -> None:
        self.state, self.error = state, error
        self._changed.set()
        self._changed = asyncio.Event()

    def _give_up(self, reason: str) -> None:
        """Take note that the host could not be started; the next try comes after a delay."""
        log.error("host %s: %s", self.key, reason)
        self._drop_link()
        if self.state != "failed":
            self._keeper.died(self, reason, [])
        self._delay = max(self._delay, BACK_OFF[0])
        self._turn("failed", reason)

    async def _reason(self) -> str:
        if self._child is None:
            return "ended"
        with suppress(TimeoutError):
            await asyncio.wait_for(self._child.ended.wait(), 0.2)
        return self._child.why()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    async def _bring_up(self) -> None:
        """Connect to the host that runs, or to a new one, and bring its devices in order."""
        link = await self._greet()
        if self.epoch and (link is None or link.epoch != self.epoch):
            await self._mourn()
        if link is None:
            self.restarts += bool(self.restarts or self._child)
            self._delay = min(max(2 * self._delay, BACK_OFF[0]), BACK_OFF[1])
            await self._fork()
            link = await self._greet()
        if link is None:
            raise MdevError(errno.EIO, f"the host {await self._reason()}; see {self._log}")
        self._drop_link()
        self._link, self.epoch = link, link.epoch
        self.parents = {parent["name"]: parent for parent in link.parents}
        await self._keeper.connected(self, link)

    async def _greet(self) -> Link | None:
        """Connect to the host that runs, if one does; one that does not answer is ended."""
        lost = asyncio.Event()
        try:
            path = self._settings.host_file(self.key, ".sock")
            link = Link.connect(path, self._told, lambda: self._gone(lost), self._uid)
        except MdevError:
            return None
        try:
            await link.hello(self._journal.seen)
        except MdevError as error:
            log.error("host %s: %s", self.key, error)
            if error.errno == errno.ETIMEDOUT:
                # It has stopped serving devices too, or it would answer: nothing is lost that is not lost already.
                _kill(link.pid, self._uid)
            link.close()
            return None
        self._lost = lost
        return link

    def _gone(self, lost: asyncio.Event) -> None:
        """Have requests wait from this moment on, and the task look after it."""
        lost.set()
        if lost is self._lost and self.state == "running":
            self._turn("starting", f"host {self.key} has gone")

    async def _mourn(self) -> None:
        """Report the death of the host we knew."""
        reason = await self._reason()
        log.error("host %s %s", self.key, reason)
        about = self._link.doomed if self._link is not None else []
        self._drop_link()
        self.epoch = ""
        self._keeper.died(self, f"its host process {reason}", about)

    async def _fork(self) -> None:
        """Have the zygote fork a host, and wait until it listens."""
        if not self.plugins:
            raise MdevError(errno.ENODEV, "no installed plugin brings its parents any more", self.key)
        child = self._child = await self._forker.fork("host", self._arguments())
        try:
            message, _ = await child.answer(START_LIMIT)
        except asyncio.CancelledError:
            self._forker.kill(child)  # it holds the lock, which the next host of this key waits for
            raise
        except TimeoutError:
            self._forker.kill(child)
            raise MdevError(errno.ETIMEDOUT, f"the host did not start within {START_LIMIT:g} s; see {self._log}") from None
        except EOFError:
            raise MdevError(errno.EIO, f"the host {await self._reason()}; see {self._log}") from None
        finally:
            child.channel.close()
        if "error" in message:
            raise MdevError(message["error"]["errno"], message["error"]["message"])

    @property
    def _uid(self) -> int:
        """Whom it runs as."""
        uid: int = self._settings.host_ids.get("uid", os.getuid())
        return uid

    @property
    def _log(self) -> Path:
        return self._settings.host_file(self.key, ".log")

    def _arguments(self) -> dict[str, Any]:
        file = self._settings.host_file
        return {
            "key": self.key,
            "plugins": self.plugins,
            "lock": str(file(self.key, ".lock")),
            "socket": str(file(self.key, ".sock")),
            "log": str(self._log),
            "front": str(file(self.key, ".front")),
            # With root's rights nothing is opened for others; what a host may make itself is fixed for as long as it lives.
            "brokered": os.getuid() == 0,
            "folder": str(self._settings.devices) if self._settings.ordinary else "",
            "user": self._settings.host_ids,
        }

    # -- what the host tells -------------------------------------------------------------------------------------------

    def _told(self, link: Link, message: Message) -> None:
        if "ask" in message:
            task = asyncio.create_task(self._open(link, message))
            self._helpers.add(task)
            task.add_done_callback(self._helpers.discard)
        else:
            self._keeper.happened(self, message)

    async def _open(self, link: Link, message: Message) -> None:
        """Answer the host's request for a socket. Who asked for it is what we know, not what a host says."""
        about, peer = link.requests.get(message.get("request", 0), ("", None))
        uuid = message["uuid"]
        try:
            fd = await self._keeper.opened(self, uuid, message["path"], peer if about == uuid else None)
        except MdevError as error:
            reply, fds = {"answer": message["ask"], "error": {"errno": error.errno, "message": str(error)}}, []
        else:
            reply, fds = {"answer": message["ask"]}, [fd]
        try:
            link.channel.send(reply, fds)
        except MdevError:
            log.info("host %s ended before it got a socket", self.key)
        finally:
            for own in fds:
                os.close(own)


def _kill(pid: int, uid: int) -> None:
    """End a process if it is `uid`'s: whoever can make a socket can make it say any process id, and have ids used again."""
    with suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if Path(f"/proc/{pid}").stat().st_uid == uid:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _read_lock(lock: Path) -> tuple[int | None, str]:
    """Return process and key of the host that holds a lock; no process when nobody does."""
    try:
        # The folder is the hosts' own: what is in it may be anything.
        fd = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None, ""
    with os.fdopen(fd) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, key = file.read(4096).partition(" ")
            return int(pid) if pid.isdigit() else None, key.rstrip("\n")
    return None, ""


def living(folder: Path) -> list[str]:
    """Return the keys of the hosts that live, by their locks; what dead ones have left is removed."""
    keys = []
    for lock in folder.glob("*.lock"):
        pid, key = _read_lock(lock)
        if pid is not None:
            keys.append(key)
        else:
            lock.with_suffix(".sock").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    for front in folder.glob("*.front"):
        # Fronts may live where their host does not; then they wait for the next one.
        if is_stale(str(front)):
            front.unlink(missing_ok=True)
    return keys
