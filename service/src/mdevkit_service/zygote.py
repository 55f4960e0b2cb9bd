"""The zygote: a process that has imported what every host needs and forks one when the service asks.

Run as ``python -P -m mdevkit_service.zygote FD``, where FD is a socket to the service. It has no thread, imports no plugin (but
the class buses of this project, which hosts share), and ends with the service; what it forked goes on. Each job runs in a
child with a socket of its own to the service.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError
from mdevkit.hints import BUS_PACKAGES
from mdevkit.plugins import BUSES, DRIVERS, Catalog, Plugin, installed

from mdevkit_service import host, opener, scout
from mdevkit_service.wire import Frames, Message, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a child can be asked to do.
JOBS: Final[dict[str, Callable[[socket.socket, Catalog, dict[str, Any]], None]]] = {
    "host": host.run,
    "scout": scout.run,
    "listen": opener.run,
}


def warm(plugins: list[Plugin]) -> None:
    """Import what hosts will need. A module that fails is left to the host, which reports it."""
    for name in ("stevedore", "mdevkit.registry"):
        importlib.import_module(name)
    for plugin in plugins:
        if plugin.group in {BUSES, DRIVERS} and plugin.distribution in BUS_PACKAGES.values():
            with contextlib.suppress(Exception):
                importlib.import_module(plugin.entry.module)


class Zygote:
    """Serves one service on `sock`."""

    def __init__(self, sock: socket.socket, plugins: list[Plugin]) -> None:
        self._sock: Final = sock
        self._plugins: Final = plugins
        self._frames: Final = Frames()
        #: Children that have not been reaped: their ids cannot be anybody else's.
        self._children: Final[set[int]] = set()
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Fork what is asked for and tell of every child that ends, until the service is gone."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                ready = [fd for fd, _ in poll.poll()]
                if self._wake in ready:
                    self._reap()
                if self._sock.fileno() in ready and not self._serve_requests():
                    return

    def _serve_requests(self) -> bool:
        data, fds = receive(self._sock)
        for message, own in self._frames.feed(data, fds):
            if "kill" in message:
                self._kill(message["kill"])
            else:
                self._fork(message, own)
        return bool(data)

    def _fork(self, message: Message, fds: list[int]) -> None:
        """Start the child for a message, whose one descriptor is the child's socket to the service."""
        (fd,) = fds
        pid = os.fork()
        if pid == 0:
            self._become(message, fd)
        os.close(fd)
        self._children.add(pid)
        send(self._sock, {"id": message["id"], "pid": pid})

    def _kill(self, pid: int) -> None:
        if pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _become(self, message: Message, fd: int) -> None:
        """Be the child: nothing of the zygote is left, and nothing returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            self._sock.close()
            os.close(self._wake)
            os.close(self._waker)
            code = work(socket.socket(fileno=fd), message["job"], Catalog(self._plugins), message["args"])
        finally:
            # Not sys.exit: the zygote's own clean-up must not run here.
            os._exit(code)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                self._children.discard(pid)
                with contextlib.suppress(BrokenPipeError):
                    send(self._sock, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def work(sock: socket.socket, job: str, catalog: Catalog, arguments: dict[str, Any]) -> int:
    """Do a job and return the exit code; an error goes to the service, if it still listens, and to the log."""
    try:
        JOBS[job](sock, catalog, arguments)
    except BaseException as error:  # noqa: BLE001  (a plugin may raise anything, and the service is waiting for an answer)
        if not isinstance(error, MdevError):
            traceback.print_exc()
        number = error.errno if isinstance(error, OSError) else None
        with contextlib.suppress(OSError):
            send(sock, {"error": {"errno": number or errno.EIO, "message": f"{error}" or type(error).__name__}})
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    """Serve the service whose socket is the descriptor in the first argument."""
    plugins = installed()
    warm(plugins)
    Zygote(socket.socket(fileno=int(sys.argv[1])), plugins).serve()


if __name__ == "__main__":
    main()
