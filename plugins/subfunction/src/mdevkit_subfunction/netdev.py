"""The network interface of a sub-function of flavour ``mlx5``, and the socket that leads to it.

What connects to the socket (QEMU with ``-netdev stream``, a program) is its user; without one, `receive` takes what comes. One
thread of the interface serves both directions; the eswitch delivers on any thread and never waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections import deque
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.sockets import Listen, socket_identity, unlink_socket
from mdevkit_virtio.virtio.stream import FrameStream, peer_name

from mdevkit_subfunction.eswitch import Eswitch, Port

#: Frames that wait for whoever takes them.
QUEUE_LENGTH: Final = 256
#: Bytes of an Ethernet header: the least a frame has.
_SHORTEST: Final = 14


class SfNetdev:
    """The interface of `port`, listening at `path`; errors of the path are those of `mdevkit.sockets.listen_at`."""

    def __init__(self, eswitch: Eswitch, port: Port, path: str, listen: Listen) -> None:
        self.path: Final = path
        self._eswitch: Final = eswitch
        self._port: Final = port
        self._frames: deque[bytes] = deque()
        self._changed: Final = threading.Condition()
        self._up = True
        self._closing = False
        self._client: FrameStream | None = None
        self._listener: Final = listen(path)
        self._identity: Final = socket_identity(path)
        self._listener.setblocking(False)
        self._wake_fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: Final = threading.Thread(target=self._main, name=f"{port.netdev} socket", daemon=True)
        self._thread.start()

    @property
    def client(self) -> str:
        """Who is connected; empty for nobody."""
        client = self._client
        return peer_name(client.sock) if client is not None else ""

    # -- frames ----------------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> bool:
        """Send a frame; false when nobody took it. EINVAL for one without a header, ENETDOWN while suspended."""
        if len(frame) < _SHORTEST:
            raise MdevError(errno.EINVAL, f"a frame of {len(frame)} bytes has no Ethernet header", self)
        if not self._up:
            raise MdevError(errno.ENETDOWN, f"{self._port.netdev} is suspended", self)
        return self._eswitch.forward(self._port, frame)

    def deliver(self, frame: bytes) -> bool:
        """See `eswitch.Function.deliver`: up to `QUEUE_LENGTH` frames wait."""
        with self._changed:
            if not self._up or len(self._frames) >= QUEUE_LENGTH:
                return False
            self._frames.append(frame)
            self._changed.notify()
        self._wake()
        return True

    def receive(self, timeout: float | None = None) -> bytes:
        """Take the next frame: ETIMEDOUT, EBUSY while a program at the socket takes them."""
        with self._changed:
            if self._client is not None:
                raise MdevError(errno.EBUSY, f"the frames of {self._port.netdev} go to {self.client}", self)
            if not self._changed.wait_for(lambda: self._frames, timeout):
                raise MdevError(errno.ETIMEDOUT, f"no frame came to {self._port.netdev} within {timeout} s", self)
            return self._frames.popleft()

    def set_up(self, up: bool) -> None:
        """Let frames pass, or none; what waits is kept."""
        self._up = up
        self._wake()

    # -- the socket ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Hang up, give the path back, and end the thread."""
        self._closing = True
        self._wake()
        self._thread.join()
        self._hang_up()
        unlink_socket(self._listener, self._identity, self.path)
        os.close(self._wake_fd)

    def let_go(self, timeout: float, force: bool) -> None:
        """Wait for the program at the socket to leave; EBUSY if it stays, unless `force`: then it is hung up on by `close`."""
        with self._changed:
            if force or self._changed.wait_for(lambda: self._client is None, timeout):
                return
        raise MdevError(errno.EBUSY, f"{self._port.netdev} is in use by {self.client}", self)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    def _main(self) -> None:
        while not self._closing:
            self._wait()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            self._accept()
            try:
                self._receive_all()
                self._send_all()
            except OSError:  # the program has gone, or speaks something else
                self._hang_up()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        if self._client is not None:
            poll.register(self._client, select.POLLIN | (select.POLLOUT if self._client.blocked else 0))
        poll.poll()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            if self._client is not None:
                connection.close()
                return
            with self._changed:
                self._client = FrameStream(connection)

    def _receive_all(self) -> None:
        if self._client is None:
            return
        for frame in self._client.receive():
            if self._up and len(frame) >= _SHORTEST:
                self._eswitch.forward(self._port, frame)

    def _send_all(self) -> None:
        while self._client is not None and self._up and not self._client.blocked:
            with self._changed:
                if not self._frames:
                    return
                frame = self._frames.popleft()
            self._client.send(frame)
        if self._client is not None and self._client.blocked:
            self._client.flush()

    def _hang_up(self) -> None:
        with self._changed:
            if self._client is not None:
                self._client.close()
                self._client = None
            self._changed.notify_all()
