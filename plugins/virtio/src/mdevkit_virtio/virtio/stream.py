"""A netdev at a UNIX socket, in the framing of QEMU's ``-netdev stream``: each frame behind its length, 4 bytes big-endian.

The program at the socket is the netdev's port: what it sends goes out, what comes in it gets. One at a time; another one is hung up
on. Neither side loses a frame while both are connected: whoever is too slow holds the other off. `FrameStream` is one end of such a
connection, for clients too.

`StreamServer` and its ports work on the netdev's interrupt thread; `let_go` and `close` are for any other.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
from collections import deque
from pathlib import Path
from typing import Final

from mdevkit.driver import libvirt_arguments
from mdevkit.errors import MdevError
from mdevkit.peers import client_of
from mdevkit.sockets import Listen, socket_identity, unlink_socket

from mdevkit_virtio.virtio.irq import IN, OUT
from mdevkit_virtio.virtio.netdev import NetDevice, NetPort

log = logging.getLogger("mdevkit.virtio")

_LENGTH: Final = struct.Struct(">I")
#: Longest frame that is one (QEMU's NET_BUFSIZE): a longer one is another protocol's.
MAX_FRAME: Final = 4096 + 65536
#: Bytes read at once.
_CHUNK: Final = 1 << 18
#: Seconds without accepting after the process has run out of descriptors.
SHORTAGE_PAUSE: Final = 0.1


def attach_arguments(client: str, path: str, mac: str, name: str) -> list[str]:
    """Return what QEMU or libvirt needs to use the netdev at a socket; empty for other clients. `name` is QEMU's for it."""
    qemu = ["-netdev", f"stream,id={name},server=off,addr.type=unix,addr.path={path.replace(',', ',,')}"]
    qemu += ["-device", f"virtio-net-pci,netdev={name},mac={mac}"]
    if client == "qemu":
        return qemu
    if client == "libvirt":
        return libvirt_arguments(qemu)
    return []


class FrameStream:
    """Frames on a stream socket, which becomes non-blocking. One thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: Final = sock
        sock.setblocking(False)
        self._incoming = bytearray()
        self._outgoing = b""

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.sock.fileno()

    @property
    def blocked(self) -> bool:
        """Whether part of a frame still waits for the peer to read: see `flush`."""
        return bool(self._outgoing)

    def receive(self) -> list[bytes]:
        """Return the whole frames that are there, after one read: ECONNRESET once the peer is gone, EPROTO for what is no frame."""
        try:
            data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise _hung_up() from error
        if not data:
            raise _hung_up()
        self._incoming += data
        return self._cut()

    def _cut(self) -> list[bytes]:
        frames, at, incoming = [], 0, self._incoming
        while len(incoming) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(incoming, at)
            if length > MAX_FRAME:
                raise MdevError(errno.EPROTO, f"the peer announces a frame of {length} bytes; {MAX_FRAME} are the most")
            end = at + _LENGTH.size + length
            if end > len(incoming):
                break
            frames.append(bytes(incoming[at + _LENGTH.size : end]))
            at = end
        del incoming[:at]
        return frames

    def send(self, frame: bytes) -> bool:
        """Send a frame, or keep what does not go out at once; false, and nothing of it sent, while `blocked`. ECONNRESET."""
        if self._outgoing and not self.flush():
            return False
        self._outgoing = _LENGTH.pack(len(frame)) + frame
        self.flush()
        return True

    def flush(self) -> bool:
        """Send what is left of the last frame; true once nothing is. ECONNRESET."""
        if self._outgoing:
            try:
                self._outgoing = self._outgoing[self.sock.send(self._outgoing, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise _hung_up() from error
        return not self._outgoing

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


def _hung_up() -> MdevError:
    return MdevError(errno.ECONNRESET, "the peer has hung up")


class StreamPort(NetPort):
    """A program that is connected to a netdev's socket."""

    def __init__(self, server: StreamServer, netdev: NetDevice, sock: socket.socket) -> None:
        self.name = str(client_of(sock))
        self._server: Final = server
        self._netdev: Final = netdev
        self._stream: Final = FrameStream(sock)
        #: Frames that wait for room in the transmit queue.
        self._waiting: Final[deque[bytes]] = deque()
        self._events = IN
        self._closed = False
        netdev.irq.watch(sock.fileno(), self._ready, IN)

    # -- from the netdev to the program ------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """See `NetPort.receive`."""
        if self._closed:
            return True
        try:
            taken = self._stream.send(frame)
        except MdevError:
            self.close()
            return True
        self._update()
        return taken

    def on_room(self) -> None:
        """See `NetPort.on_room`."""
        if not self._closed:
            self._send_waiting()
            self._update()

    def on_gone(self) -> None:
        """See `NetPort.on_gone`."""
        self.close()

    # -- from the program to the netdev ------------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        try:
            if events & OUT and self._stream.flush():
                self._netdev.resume()
            if events & (IN | select.EPOLLHUP | select.EPOLLERR):
                self._waiting.extend(self._stream.receive())
                self._send_waiting()
        except MdevError as error:
            if error.errno == errno.EPROTO:
                log.warning("%s: %s: %s", self._netdev, self.name, error)
            self.close()
        else:
            self._update()

    def _send_waiting(self) -> None:
        while self._waiting:
            try:
                if not self._netdev.try_send(self._waiting[0]):
                    return
            except MdevError:
                # As on a wire: a frame that is too long, or sent while the link is down, is lost.
                self._netdev.count_tx_dropped()
            self._waiting.popleft()

    def _update(self) -> None:
        """Wait for what is to come next: a program whose frames find no room is not listened to meanwhile."""
        events = (0 if self._waiting else IN) | (OUT if self._stream.blocked else 0)
        if events != self._events and not self._closed:
            self._events = events
            self._netdev.irq.change(self._stream.fileno(), events)

    def close(self) -> None:
        """Hang up, and leave the netdev to others; on the interrupt thread, or with it paused. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._netdev.irq.unwatch(self._stream.fileno())
        self._netdev.disconnect(self)
        self._stream.close()
        self._server.left(self)


class StreamServer:
    """Listens at `path` and connects whoever comes to `netdev`. Errors of the constructor are those of `listen`."""

    def __init__(self, netdev: NetDevice, path: str, listen: Listen) -> None:
        #: Absolute: whoever made the socket may be another process, in another folder.
        self.path: Final = str(Path(path).absolute())
        self._netdev: Final = netdev
        self._port: StreamPort | None = None
        self._closed = False
        self._listener: Final = listen(self.path)
        self._listener.setblocking(False)
        self._identity: Final = socket_identity(self.path)
        netdev.irq.watch(self._listener.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("%s: nobody can be accepted: %s", self._netdev, error)
            self._pause()
            return
        if not self._netdev.free:
            sock.close()
            return
        self._port = StreamPort(self, self._netdev, sock)
        self._netdev.connect(self._port)
        log.info("%s: %s is connected", self._netdev, self._port.name)

    def _pause(self) -> None:
        """Accept nobody for a while: who waits goes on waiting, and would wake us at once again."""
        self._netdev.irq.change(self._listener.fileno(), 0)
        again = threading.Timer(SHORTAGE_PAUSE, self._netdev.irq.post, [self._go_on])
        again.daemon = True
        again.start()

    def _go_on(self) -> None:
        if not self._closed:
            self._netdev.irq.change(self._listener.fileno(), IN)

    def left(self, port: StreamPort) -> None:
        """Note that a port has hung up; for the port."""
        log.info("%s: %s is not connected any more", self._netdev, port.name)
        if self._port is port:
            self._port = None

    def let_go(self, timeout: float, force: bool) -> None:
        """See `NetDevice.let_go`; with `force` a program at the socket is hung up on."""
        self._netdev.let_go(timeout, force)
        if force:
            self._hang_up()

    def _hang_up(self) -> None:
        with self._netdev.irq.paused():
            if self._port is not None:
                self._port.close()

    def close(self) -> None:
        """Hang up on whoever is connected and take the socket away. Closing twice is harmless."""
        with self._netdev.irq.paused():
            if self._closed:
                return
            self._closed = True
            self._hang_up()
            self._netdev.irq.unwatch(self._listener.fileno())
        unlink_socket(self._listener, self._identity, self.path)
