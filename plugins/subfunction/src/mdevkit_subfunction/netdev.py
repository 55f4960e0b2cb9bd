"""The network interface of a sub-function of flavour ``mlx5``, and the socket that leads to it.

What connects to the socket (QEMU with ``-netdev stream``, a program) is its user; without one, `receive` takes what comes. One
thread of the interface serves both directions; the eswitch delivers on any thread and never waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
from collections import deque
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.peers import client_of
from mdevkit.sockets import Listen, socket_identity, unlink_socket
from mdevkit_virtio.virtio.stream import FrameStream

from mdevkit_subfunction.eswitch import Eswitch, Port

log: Final = logging.getLogger("mdevkit.subfunction")

#: Frames that wait for whoever takes them.
QUEUE_LENGTH: Final = 256
#: Bytes of an Ethernet header: the least a frame has.
_SHORTEST: Final = 14
#: How long nobody is accepted after that has failed, in milliseconds.
_HOLD_OFF_MS: Final = 100


class SfNetdev:
    """The interface of `port`, listening at `path`; errors of the path are those of `mdevkit.sockets.listen_at`."""

    def __init__(self, eswitch: Eswitch, port: Port, path: str, listen: Listen) -> None:
        #: Absolute: whoever made the socket may be another process, in another folder.
        self.path: Final = str(Path(path).absolute())
        self._eswitch: Final = eswitch
        self._port: Final = port
        self._frames: deque[bytes] = deque()
        #: Guards frames, client and the end; the eventfd is open as long as `_closing` is not set.
        self._changed: Final = threading.Condition()
        self._up = True
        self._closing = self._leaving = self._hold_off = False
        self._stream: FrameStream | None = None
        self._client = ""
        with contextlib.ExitStack() as stack:
            self._wake_fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._wake_fd)
            self._listener: Final = listen(self.path)
            stack.callback(self._remove_socket, socket_identity(self.path))
            self._listener.setblocking(False)
            self._thread: Final = threading.Thread(target=self._main, name=f"{port.netdev} socket", daemon=True)
            self._thread.start()
            self._stack: Final = stack.pop_all()

    def _remove_socket(self, identity: tuple[int, int]) -> None:
        unlink_socket(self._listener, identity, self.path)

    @property
    def client(self) -> str:
        """Who is connected; empty for nobody."""
        return self._client

    # -- frames ----------------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> bool:
        """Send a frame; false when nobody took it. EINVAL for one without a header, ENETDOWN while suspended."""
        if len(frame) < _SHORTEST:
            raise MdevError(errno.EINVAL, f"a frame of {len(frame)} bytes has no Ethernet header", self)
        if not self._up:
            raise MdevError(errno.ENETDOWN, f"{self._port.netdev} is suspended", self)
        return self._eswitch.forward(self._port, frame)

    def deliver(self, frame: bytes) -> bool:
        """See `eswitch.Function.deliver`: up to `QUEUE_LENGTH` frames wait, none while the interface is suspended or gone."""
        with self._changed:
            if self._closing or not self._up or len(self._frames) >= QUEUE_LENGTH:
                return False
            self._frames.append(frame)
            self._changed.notify()
            self._wake()
        return True

    def receive(self, timeout: float | None = None) -> bytes:
        """Take the next frame: ETIMEDOUT, EBUSY while a program at the socket takes them, ENODEV once the interface has gone."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._frames or self._client or self._closing, timeout):
                raise MdevError(errno.ETIMEDOUT, f"no frame came to {self._port.netdev} within {timeout} s", self)
            if self._client:
                raise MdevError(errno.EBUSY, f"the frames of {self._port.netdev} go to {self._client}", self)
            if not self._frames:
                raise MdevError(errno.ENODEV, f"{self._port.netdev} has gone", self)
            return self._frames.popleft()

    def set_up(self, up: bool) -> None:
        """Let frames pass, or none: what waits is kept, and the program at the socket is not listened to meanwhile."""
        with self._changed:
            self._up = up
            self._wake()

    # -- the socket ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Hang up, give the path back, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._wake()
        self._thread.join()
        self._hang_up()
        self._stack.close()

    def let_go(self, timeout: float, force: bool) -> None:
        """Wait for the program at the socket to leave, admitting no other; EBUSY if it stays.

        With `force` there is nothing to wait for: `close` hangs up on it.
        """
        with self._changed:
            self._leaving = True
            if force or self._changed.wait_for(lambda: not self._client, timeout):
                return
            self._leaving = False
        raise MdevError(errno.EBUSY, f"{self._port.netdev} is in use by {self._client}", self)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    # -- on the thread -----------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        while not self._closing:
            ready = self._wait()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            if self._listener.fileno() in ready:
                self._accept()
            try:
                self._serve(ready)
            except OSError:  # the program has gone, or speaks something else
                self._hang_up()

    def _wait(self) -> dict[int, int]:
        """Wait for something to do; return events by descriptor."""
        held_off, self._hold_off = self._hold_off, False
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if not held_off:
            poll.register(self._listener, select.POLLIN)
        if self._stream is not None:
            listened = select.POLLIN if self._up else 0
            poll.register(self._stream, listened | (select.POLLOUT if self._stream.blocked and self._up else 0))
        return dict(poll.poll(_HOLD_OFF_MS if held_off else None))

    def _accept(self) -> None:
        """Take a program as the interface's user, unless there is one."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors or memory: it would be ready again at once
            log.warning("%s: nobody can connect: %s", self._port.netdev, error)
            self._hold_off = True
            return
        with self._changed:
            if self._stream is not None or self._leaving:
                connection.close()
                return
            self._stream, self._client = FrameStream(connection), str(client_of(connection))
            self._changed.notify_all()

    def _serve(self, ready: dict[int, int]) -> None:
        if self._stream is None:
            return
        events = ready.get(self._stream.fileno(), 0)
        if events & (select.POLLHUP | select.POLLERR) and not events & select.POLLIN:
            self._hang_up()
        elif self._up:
            self._receive_all(self._stream)
            self._send_all(self._stream)

    def _receive_all(self, stream: FrameStream) -> None:
        for frame in stream.receive():
            if len(frame) >= _SHORTEST:
                self._eswitch.forward(self._port, frame)

    def _send_all(self, stream: FrameStream) -> None:
        while self._up and stream.flush():
            with self._changed:
                if not self._frames:
                    return
                frame = self._frames.popleft()
            stream.send(frame)

    def _hang_up(self) -> None:
        with self._changed:
            if self._stream is not None:
                self._stream.close()
                self._stream, self._client = None, ""
            self._changed.notify_all()
