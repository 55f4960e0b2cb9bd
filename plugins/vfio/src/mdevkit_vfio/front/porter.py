"""The porter: holds the listening sockets of devices nobody uses, and forks a front for each that gets a client.

Started by the process of a device (`mdevkit_vfio.transport.Fronts`) and outlives it. It is one small process however many
devices there are; only a device in use has a process of its own, so that a client who floods its front slows nobody else.

A device is *registered* by the connection of the process that serves it. When that process dies the registration stays, for
`AWAY` seconds without a client and for as long as there is one with; unless its process has come back and brought other
devices again but not this one: then it has been removed meanwhile. The porter ends when it has nothing left to hold, and it
removes every socket file it holds, whatever it ends of (but SIGKILL).

One thread. Forking is safe because there is no other, and because a front never returns into this module.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Final

from mdevkit.sockets import socket_identity, unlink_socket

from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.front.control import Control, pair
from mdevkit_vfio.front.front import Front
from mdevkit_vfio.front.wire import Limits

log = logging.getLogger("mdevkit.front")

#: Seconds a device without a client waits for its process.
AWAY: Final = 30.0
#: Seconds the porter stays without a device.
LINGER: Final = 1.0
#: Seconds between two looks at the clock.
TICK: Final = 1.0


class Process:
    """The connection of a process that serves a device, before and after it has said which."""

    def __init__(self, control: Control) -> None:
        self.control: Final = control
        self.device: Device | None = None


class Device:
    """A registered device."""

    def __init__(self, name: str, path: str, listener: socket.socket, limits: Limits) -> None:
        listener.setblocking(False)
        self.name: Final = name
        self.path: Final = path
        self.listener: Final = listener
        self.limits: Final = limits
        self.identity: Final = socket_identity(path)
        #: Who serves it; None while its process is away, which it is since `since`.
        self.process: Process | None = None
        self.since = time.monotonic()
        #: Its front, while there is one.
        self.front: Control | None = None
        self.pid = 0
        #: The front waits for a connection to the device's process.
        self.wanted = False
        #: Why it is not to be served any more.
        self.failed: str | None = None

    @property
    def removed(self) -> bool:
        """Whether somebody has removed its socket while its process was away, and so the device."""
        return self.process is None and socket_identity(self.path) != self.identity


class Porter:
    """Serves whoever connects to `listener`, which is bound to `path`. `away` is `AWAY` but in tests."""

    def __init__(self, listener: socket.socket, path: str, *, away: float = AWAY) -> None:
        self._away: Final = away
        self._listener: Final = listener
        self._path: Final = path
        self._identity: Final = socket_identity(path)
        self._epoll: Final = select.epoll()
        self._processes: Final[dict[int, Process]] = {}
        self._devices: Final[dict[str, Device]] = {}
        #: By descriptor: listeners of devices without a front, and fronts.
        self._waiting: Final[dict[int, Device]] = {}
        self._fronts: Final[dict[int, Device]] = {}
        #: When a process last registered a device.
        self._arrival = 0.0
        self._busy_since = time.monotonic()

    def serve(self) -> None:
        """Run until there is nothing left to hold."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener, select.EPOLLIN)
        try:
            while self._needed():
                for fd, _ in self._epoll.poll(TICK):
                    self._handle(fd)
                self._drop_the_lost()
        finally:
            # The name goes first: whoever still finds it gets a connection that ends, and starts another porter.
            unlink_socket(self._listener, self._identity, self._path)
            for device in list(self._devices.values()):
                self._drop(device)

    def _needed(self) -> bool:
        if self._devices or self._processes:
            self._busy_since = time.monotonic()
        return time.monotonic() - self._busy_since < LINGER

    def _handle(self, fd: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
        elif fd in self._processes:
            self._hear_process(self._processes[fd])
        elif fd in self._fronts:
            self._hear_front(self._fronts[fd])
        elif fd in self._waiting:
            self._fork(self._waiting[fd])

    # -- processes of devices ---------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            sock, _ = self._listener.accept()
            process = Process(Control(sock))
            self._processes[sock.fileno()] = process
            self._epoll.register(sock, select.EPOLLIN)

    def _hear_process(self, process: Process) -> None:
        note = process.control.receive()
        if note is None:
            self._forget(process)
            return
        if note.facts["op"] == "serve":
            self._register(process, note.facts, note.fds)
            return
        close_all(note.fds)
        if note.facts["op"] == "remove":
            if process.device is not None and process.device.process is process:
                self._drop(process.device)
            # The end of the connection is the answer: nothing is left.
            self._forget(process)

    def _forget(self, process: Process) -> None:
        """Take note that a process has died, or has finished."""
        device = process.device
        del self._processes[process.control.fileno()]
        self._epoll.unregister(process.control.fileno())
        process.control.close()
        if device is not None and device.process is process:
            device.process, device.since = None, time.monotonic()

    def _register(self, process: Process, facts: dict[str, Any], fds: list[int]) -> None:
        name, path = str(facts["name"]), str(facts["path"])
        device = self._devices.get(name)
        if device is not None and (device.path != path or device.removed):
            self._drop(device)
            device = None
        if device is None and fds:
            device = self._add(Device(name, path, socket.socket(fileno=fds.pop(0)), Limits(*facts["limits"])))
        close_all(fds)
        if device is None:
            process.control.send({"state": "unknown"})
        elif device.failed:
            process.control.send({"state": "failed", "reason": device.failed})
        elif device.process is not None and _alive(device.process):
            process.control.send({"state": "busy"})
        else:
            process.device, device.process = device, process
            self._arrival = time.monotonic()
            process.control.send({"state": "served"}, [device.listener.fileno()])
            self._connect(device)

    def _add(self, device: Device) -> Device:
        self._devices[device.name] = device
        self._await_client(device)
        return device

    def _drop(self, device: Device) -> None:
        """Forget a device: no socket, no client, no front."""
        del self._devices[device.name]
        self._await_nobody(device)
        unlink_socket(device.listener, device.identity, device.path)
        if device.process is not None:
            device.process.device = None
        if device.front is not None:
            device.front.send({"op": "remove"})
            self._end_front(device)

    def _drop_the_lost(self) -> None:
        now = time.monotonic()
        for device in [device for device in self._devices.values() if device.process is None]:
            forgotten = device.since < self._arrival < now - self._away
            if forgotten or (device.front is None and device.since < now - self._away):
                log.warning("%s: its process has not come back; its socket is closed", device.name)
                self._drop(device)

    # -- fronts -----------------------------------------------------------------------------------------------------

    def _await_client(self, device: Device) -> None:
        self._waiting[device.listener.fileno()] = device
        self._epoll.register(device.listener, select.EPOLLIN)

    def _await_nobody(self, device: Device) -> None:
        if self._waiting.pop(device.listener.fileno(), None) is not None:
            self._epoll.unregister(device.listener)

    def _fork(self, device: Device) -> None:
        """Make a front for a device whose first client has come."""
        ours, its = pair()
        try:
            device.pid = os.fork()
        except OSError as error:
            log.error("%s: no front can be started: %s", device.name, error)
            ours.close()
            its.close()
            time.sleep(TICK / 10)  # the client is still there, and so is the reason
            return
        if device.pid == 0:
            _become_front(device, its)
        its.close()
        self._await_nobody(device)
        device.front, device.wanted = ours, False
        self._fronts[ours.fileno()] = device
        self._epoll.register(ours.fileno(), select.EPOLLIN)

    def _hear_front(self, device: Device) -> None:
        assert device.front is not None
        note = device.front.receive()
        if note is None:
            self._end_front(device)
            self._await_client(device)
        elif note.facts["op"] == "want":
            device.wanted = True
            self._connect(device)
        elif note.facts["op"] == "failed":
            device.failed = note.facts["reason"]
            if device.process is not None:
                # One that had registered before the front saw what became of the last one.
                device.process.control.send(note.facts)

    def _end_front(self, device: Device) -> None:
        """Let go of a front that has ended, or that ends because it has just been told so."""
        assert device.front is not None
        del self._fronts[device.front.fileno()]
        self._epoll.unregister(device.front.fileno())
        device.front.close()
        device.front = device.failed = None
        os.waitpid(device.pid, 0)

    def _connect(self, device: Device) -> None:
        """Connect a front that waits for the device's process with it, if both are there."""
        if not device.wanted or device.front is None or device.process is None:
            return
        one, other = socket.socketpair()
        with one, other:
            # A process that is just dying leaves the connection to nobody; its front will see that, and want another.
            device.wanted = not device.process.control.send({"op": "session"}, [one.fileno()])
            if not device.wanted:
                device.front.send({"op": "device"}, [other.fileno()])


def _alive(process: Process) -> bool:
    poll = select.poll()
    poll.register(process.control.fileno(), select.POLLRDHUP)
    return not poll.poll(0)


def _become_front(device: Device, porter: Control) -> None:
    """Be the front of `device`, in a process just forked; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _close_others({0, 1, 2, porter.fileno(), device.listener.fileno()})
        Path("/proc/self/comm").write_text(f"front {device.name[:8]}")
        Front(device.listener, porter, device.name, device.limits).run()
        code = 0
    except BaseException:  # noqa: BLE001  (nothing may run in the forked copy of the porter)
        traceback.print_exc()
    finally:
        os._exit(code)


def _close_others(kept: set[int]) -> None:
    """Close what is the porter's and other devices'. Their objects are never used again, nor finalized."""
    with os.scandir("/proc/self/fd") as entries:
        open_ones = [int(entry.name) for entry in entries]
    close_all(fd for fd in open_ones if fd not in kept)


def _end(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def main() -> None:
    """Be a porter for the listening descriptor and the path in the first two arguments."""
    fd, path = int(sys.argv[1]), sys.argv[2]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    # Whoever has started us may ignore it, and then no front could be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    Path("/proc/self/comm").write_text("mdev porter")
    Porter(socket.socket(fileno=fd), path).serve()
