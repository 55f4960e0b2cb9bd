"""One connection to a host process: requests and their answers, and what the host tells of itself. On the event loop's thread."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mdevkit.errors import MdevError
from mdevkit.peers import credentials

from mdevkit_service.records import Peer
from mdevkit_service.wire import Channel, Message

#: Seconds a host gets to say hello.
HELLO_LIMIT: Final = 10.0


class HostDiedError(MdevError):
    """The host ended before it answered."""


class Link:
    """A connected host. `told` gets what is no answer (events, questions); `lost` is called once, when the host has gone."""

    def __init__(self, sock: socket.socket, told: Callable[[Link, Message], None], lost: Callable[[], None]) -> None:
        #: The process that listens there.
        self.pid: Final = credentials(sock)[0]
        self._told: Final = told
        self._lost: Final = lost
        self._ids: Final = itertools.count(1)
        self._waiting: Final[dict[int, asyncio.Future[Any]]] = {}
        #: Requests under way: number to the UUID they are about, and whoever names paths in them.
        self.requests: Final[dict[int, tuple[str, Peer | None]]] = {}
        #: Whom requests were about when the host died.
        self.doomed: list[str] = []
        #: Identifies the process, and tells its parents; after `hello`.
        self.epoch = ""
        self.parents: list[dict[str, Any]] = []
        self.channel: Final = Channel(sock, self._received, self._closed)

    @classmethod
    def connect(cls, path: Path, told: Callable[[Link, Message], None], lost: Callable[[], None], user: int | None = None) -> Link:
        """Connect to a host of ours or of `user`: ECONNREFUSED or ENOENT when there is none, EPERM when it is somebody else's."""
        try:
            sock = _connected(path)
        except OSError as error:
            raise MdevError(error.errno or errno.EIO, f"no host at {path}: {error.strerror}", path) from error
        _, owner, _ = credentials(sock)
        if owner not in {os.getuid(), user}:
            sock.close()
            raise MdevError(errno.EPERM, f"{path} is user {owner}'s, not a host of ours", path)
        return cls(sock, told, lost)

    async def call(self, op: str, *, about: str = "", peer: Peer | None = None, **arguments: Any) -> Any:
        """Have the host carry out an operation, which may name paths on behalf of `peer`; its error, or HostDiedError."""
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.requests[number] = about, peer
        try:
            if not self.channel.open:
                raise HostDiedError(errno.EIO, "its host has ended")
            self.channel.send({"id": number, "op": op, "args": arguments})
            return await future
        finally:
            del self._waiting[number], self.requests[number]

    async def hello(self, seen: dict[str, int]) -> None:
        """Introduce ourselves; from now on the host sends the events that came after those `seen`. ETIMEDOUT when it hangs."""
        try:
            facts = await asyncio.wait_for(self.call("hello", seen=seen), HELLO_LIMIT)
        except TimeoutError:
            raise MdevError(errno.ETIMEDOUT, f"the host process {self.pid} does not answer") from None
        self.epoch, self.parents = facts["epoch"], facts["parents"]

    def close(self) -> None:
        """Leave the host alone."""
        self.channel.close()
        self._fail()

    def _received(self, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        future = self._waiting.get(message.get("id", 0))
        if future is None:
            self._told(self, message)
        elif future.done():
            return
        elif "error" in message:
            future.set_exception(MdevError(message["error"]["errno"], message["error"]["message"]))
        else:
            future.set_result(message["result"])

    def _closed(self) -> None:
        self.doomed = [about for about, _ in self.requests.values()]
        self._fail()
        self._lost()

    def _fail(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(HostDiedError(errno.EIO, "its host has ended"))


def _connected(path: Path) -> socket.socket:
    """Connect to the very socket at `path`, which others may have put there: ELOOP for a link, ENOTSOCK, EAGAIN when it is busy."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        sock.setblocking(False)
        sock.connect(f"/proc/self/fd/{fd}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock
