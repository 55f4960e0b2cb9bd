"""The service's side of the zygote: starts one, has it fork, and learns how its children ended. On the event loop's thread."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any, Final

from mdevkit.errors import MdevError

from mdevkit_service.wire import Channel, Message

log = logging.getLogger("mdevkit.service")

#: Seconds a zygote gets to answer; it may still be importing.
_LIMIT: Final = 30.0


def spawn(environment: dict[str, str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a zygote and return our end of its socket. May be called before there is an event loop."""
    ours, its = socket.socketpair()
    with its:
        command = [sys.executable, "-P", "-m", "mdevkit_service.zygote", str(its.fileno())]
        process = subprocess.Popen(command, pass_fds=[its.fileno()], env=environment, stdin=subprocess.DEVNULL)
    return ours, process


class Child:
    """A process the zygote forked, and what it says first."""

    def __init__(self, sock: socket.socket) -> None:
        #: Process id; 0 until the zygote has told it.
        self.pid = 0
        #: How it ended: exit code, negative for a signal; None when that cannot be told.
        self.code: int | None = None
        self.ended: Final = asyncio.Event()
        self._first: Final[asyncio.Future[tuple[Message, list[int]]]] = asyncio.get_running_loop().create_future()
        self.channel: Final = Channel(sock, self._received, self._closed)

    async def answer(self, limit: float) -> tuple[Message, list[int]]:
        """Return its first message: EOFError when it ends without one, TimeoutError after `limit` seconds."""
        return await asyncio.wait_for(self._first, limit)

    def _received(self, message: Message, fds: list[int]) -> None:
        if self._first.done():
            for fd in fds:
                os.close(fd)
        else:
            self._first.set_result((message, fds))

    def _closed(self) -> None:
        if not self._first.done():
            self._first.set_exception(EOFError())

    def why(self) -> str:
        """Return how it ended, for a sentence."""
        if self.code is None:
            return "ended"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class Forker:
    """Keeps a zygote; a new one is started when it is needed and the old one has died."""

    def __init__(self, environment: dict[str, str], started: tuple[socket.socket, subprocess.Popen[bytes]] | None = None) -> None:
        self._environment: Final = environment
        self._started = started
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ids: Final = itertools.count(1)
        #: Children asked for: number of the request to the child, and who waits for it.
        self._waiting: Final[dict[int, tuple[Child, asyncio.Future[None]]]] = {}
        self._children: Final[dict[int, Child]] = {}

    async def fork(self, job: str, arguments: dict[str, Any]) -> Child:
        """Have a child do a job; EIO when there is no zygote to be had."""
        channel = self._connected()
        ours, its = socket.socketpair()
        number, child = next(self._ids), Child(ours)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = child, future
        with its:
            channel.send({"id": number, "job": job, "args": arguments}, [its.fileno()])
        try:
            await asyncio.wait_for(future, _LIMIT)
        except (TimeoutError, MdevError) as error:
            child.channel.close()
            raise MdevError(errno.EIO, f"no process could be started: {error or 'the zygote does not answer'}") from error
        finally:
            self._waiting.pop(number, None)
        return child

    async def ask(self, job: str, arguments: dict[str, Any], limit: float) -> tuple[Message, list[int]]:
        """Have a child do a job that has one answer: its error, EIO when it dies without one, ETIMEDOUT."""
        child = await self.fork(job, arguments)
        try:
            message, fds = await child.answer(limit)
        except TimeoutError:
            self.kill(child)
            raise MdevError(errno.ETIMEDOUT, f"it took longer than {limit:g} s") from None
        except EOFError:
            with suppress(TimeoutError):
                await asyncio.wait_for(child.ended.wait(), 1.0)
            raise MdevError(errno.EIO, f"its process {child.why()}") from None
        finally:
            child.channel.close()
        if "error" in message:
            raise MdevError(message["error"]["errno"], message["error"]["message"])
        return message, fds

    def kill(self, child: Child) -> None:
        """End a child that has not ended yet."""
        if self._channel is not None and self._channel.open and not child.ended.is_set():
            self._channel.send({"kill": child.pid})

    def close(self) -> None:
        """Let the zygote go; what it forked goes on."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.wait()

    def _connected(self) -> Channel:
        if self._channel is None or not self._channel.open:
            sock, process = self._started or spawn(self._environment)
            self._started = None
            if self._process is not None:
                self._process.wait()
            self._channel, self._process = Channel(sock, self._received, self._lost), process
        return self._channel

    def _received(self, message: Message, _fds: list[int]) -> None:
        if "ended" in message:
            child = self._children.pop(message["ended"], None)
            if child is not None:
                child.code = message["code"]
                child.ended.set()
        elif waiting := self._waiting.pop(message["id"], None):
            child, future = waiting
            child.pid = message["pid"]
            # Here, and not when who waits goes on: the next message may be that it has ended.
            self._children[child.pid] = child
            if not future.done():
                future.set_result(None)

    def _lost(self) -> None:
        """Take note that the zygote died: nobody will tell how its children end."""
        log.warning("the zygote died; a new one is started when it is needed")
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(MdevError(errno.EIO, "the zygote died"))
        for child in self._children.values():
            child.ended.set()
        self._children.clear()
