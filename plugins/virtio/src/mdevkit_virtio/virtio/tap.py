"""TAP interfaces: a way from a netdev into the host's network stack, for whoever may make one.

A TAP belongs to the network namespace of the thread that opens it. `TapPort` connects one with a netdev of this process;
`mdevkit_virtio.virtio.tapcli` with one of another process, by the user's own rights.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.virtio.irq import IN, OUT
from mdevkit_virtio.virtio.netdev import NetDevice, NetPort

_DEVICE: Final = "/dev/net/tun"
#: Longest name of an interface (IFNAMSIZ without its NUL).
MAX_NAME: Final = 15
#: ioctls and flags of if_tun.h and sockios.h.
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU = 0x8913, 0x8914, 0x8922
_IFF_UP: Final = 1
_IFREQ_FLAGS: Final = struct.Struct("16sH22x")
_IFREQ_MTU: Final = struct.Struct("16si20x")
#: Longest frame a TAP gives: one that is not segmented yet.
_MAX_READ: Final = 1 << 17
#: Frames read from a TAP before others have their turn.
_BURST: Final = 64


class Tap:
    """A TAP interface, frames without a header before them. One thread at a time."""

    def __init__(self, fd: int) -> None:
        """Take over the descriptor of a TAP: EINVAL if it is none."""
        os.set_blocking(fd, False)
        try:
            reply = fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ_FLAGS.size))
        except OSError as error:
            raise MdevError(errno.EINVAL, f"descriptor {fd} is no TAP interface: {error.strerror}") from error
        name, flags = _IFREQ_FLAGS.unpack(reply)
        if not flags & _IFF_TAP or not flags & _IFF_NO_PI:
            raise MdevError(errno.EINVAL, f"descriptor {fd} is no TAP interface without packet information (IFF_TAP, IFF_NO_PI)")
        self._fd: Final = fd
        self.name: Final = name.rstrip(b"\0").decode()

    @classmethod
    def open(cls, name: str = "") -> Tap:
        """Open a TAP by name, making it if there is none; "" lets the kernel choose a name.

        EPERM, EBUSY and ENOENT say what to do; EINVAL for a name that cannot be, or of another kind of interface.
        """
        raw = os.fsencode(name)
        if len(raw) > MAX_NAME:
            raise MdevError(errno.EINVAL, f"{name!r} has {len(raw)} bytes, an interface's name may have {MAX_NAME}", name)
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _not_opened(error) from error
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ_FLAGS.pack(raw, _IFF_TAP | _IFF_NO_PI))
            return cls(fd)
        except OSError as error:
            os.close(fd)
            raise _not_made(name or "a TAP interface", error) from error

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._fd

    def set_up(self, mtu: int) -> None:
        """Set the MTU and bring the interface up; EPERM without the right to."""
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                name = self.name.encode()
                fcntl.ioctl(control, _SIOCSIFMTU, _IFREQ_MTU.pack(name, mtu))
                _, flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name, 0)))
                fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name, flags | _IFF_UP))
        except OSError as error:
            message = f"{self.name} cannot be set up ({error.strerror}); as root: ip link set {self.name} mtu {mtu} up"
            raise MdevError(error.errno or errno.EIO, message, self) from error

    def read(self) -> bytes | None:
        """Return a frame the host sends; None when there is none now. EIO once the interface is gone."""
        try:
            return os.read(self._fd, _MAX_READ)
        except BlockingIOError:
            return None
        except OSError as error:
            raise MdevError(errno.EIO, f"{self.name} is gone ({error.strerror})", self) from error

    def write(self, frame: bytes) -> bool:
        """Let the host receive a frame; false if it takes none now. While the interface is down frames are lost, as on a wire."""
        try:
            os.write(self._fd, frame)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in {errno.EIO, errno.EINVAL}:
                raise MdevError(errno.EIO, f"{self.name} is gone ({error.strerror})", self) from error
        return True

    def close(self) -> None:
        """Close it; an interface that was made by `open` goes with it."""
        os.close(self._fd)


def _not_opened(error: OSError) -> MdevError:
    hints = {errno.ENOENT: "; load the module first: modprobe tun", errno.EACCES: "; ask for access to it"}
    return MdevError(error.errno or errno.EIO, f"cannot open {_DEVICE}: {error.strerror}{hints.get(error.errno or 0, '')}", _DEVICE)


def _not_made(name: str, error: OSError) -> MdevError:
    if isinstance(error, MdevError):
        return error
    shown = name if " " not in name else "tap0"
    reasons = {
        errno.EPERM: "that needs CAP_NET_ADMIN. As root make one for yourself: "
        f"ip tuntap add dev {shown} mode tap user $USER && ip link set {shown} up; "
        "or try it in a network namespace of your own: unshare -Urn",
        errno.EBUSY: "another program has it open",
        errno.EINVAL: "it is no TAP interface, or no name for one",
    }
    reason = reasons.get(error.errno or 0, error.strerror)
    return MdevError(error.errno or errno.EIO, f"cannot open {name}: {reason}", name)


class TapPort(NetPort):
    """Connects a TAP with a netdev of this process: EBUSY if that is in use. The TAP is closed with the port.

    Neither direction loses a frame here: what one side cannot take stays with the other. The host drops what it
    sends beyond the interface's txqueuelen. `on_end` is called, on the interrupt thread, if TAP or netdev go away.
    """

    def __init__(self, netdev: NetDevice, tap: Tap, on_end: Callable[[], None] = lambda: None) -> None:
        self.name = f"{tap.name} (pid {os.getpid()})"
        self.tap: Final = tap
        self._netdev: Final = netdev
        self._on_end: Final = on_end
        #: A frame of the host's that waits for room in the transmit queue.
        self._waiting: bytes | None = None
        self._deaf = False
        self._events = IN
        self._closed = False
        netdev.connect(self)
        netdev.irq.watch(tap.fileno(), self._ready)

    def receive(self, frame: bytes) -> bool:
        """See `NetPort.receive`."""
        try:
            self._deaf = not self.tap.write(frame)
        except MdevError:
            self._end()
        else:
            self._update()
        return not self._deaf

    def on_room(self) -> None:
        """See `NetPort.on_room`."""
        self._forward()

    def on_gone(self) -> None:
        """See `NetPort.on_gone`."""
        self._end()

    def _ready(self, events: int) -> None:
        if events & OUT and self._deaf:
            self._deaf = False
            self._netdev.resume()
        self._forward()

    def _forward(self) -> None:
        """Send what the host has sent."""
        try:
            for _ in range(_BURST):
                if self._waiting is None and (frame := self.tap.read()) is not None:
                    self._waiting = frame
                if self._waiting is None or not self._send(self._waiting):
                    break
                self._waiting = None
        except MdevError:
            self._end()
        else:
            self._update()

    def _send(self, frame: bytes) -> bool:
        try:
            return self._netdev.try_send(frame)
        except MdevError:
            self._netdev.count_tx_dropped()
            return True

    def _update(self) -> None:
        events = (0 if self._waiting is not None else IN) | (OUT if self._deaf else 0)
        if events != self._events and not self._closed:
            self._events = events
            self._netdev.irq.change(self.tap.fileno(), events)

    def _end(self) -> None:
        if not self._closed:
            self.close()
            self._on_end()

    def close(self) -> None:
        """Disconnect, and close the TAP. From any thread; closing twice is harmless."""
        with self._netdev.irq.paused():
            if self._closed:
                return
            self._closed = True
            self._netdev.irq.unwatch(self.tap.fileno())
            self._netdev.disconnect(self)
            self.tap.close()
