"""Ways to a running device's frames: its vhost-user socket, as a frontend, or the socket of its netdev.

A link is found by the facts of a device (`mdevkit attach UUID --json`). It belongs to one thread.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final, Protocol

from mdevkit.errors import MdevError

from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.vhost.frontend import NetPair, VhostUserFrontend
from mdevkit_virtio.vhost.proto import ProtocolFeature
from mdevkit_virtio.virtio.clients import NETDEV, VHOST_USER, Facts, check_kind, open_stream, reach
from mdevkit_virtio.virtio.net import DEFAULT_MTU, F_MTU, MTU_AT
from mdevkit_virtio.virtio.netdev import ETH_HEADER

#: Bytes of the memory shared with a vhost-user device: rings, and 256 buffers of 64 KiB each way.
_MEMORY: Final = 64 << 20


class Link(Protocol):
    """Frames to a device and back."""

    #: Bytes of the longest frame.
    max_frame: int

    def send(self, frames: Sequence[bytes]) -> int:
        """Send frames, as many as there is room for, and return how many those are. ECONNRESET once the device is gone."""
        ...

    def receive(self) -> list[bytes]:
        """Return what has come; does not wait. ECONNRESET."""
        ...

    def wait(self, timeout: float, *, room: bool) -> None:
        """Wait until a frame comes, with `room` until one can be sent too, or `timeout` seconds."""
        ...

    def close(self) -> None:
        """Leave the device."""
        ...


class StreamLink:
    """The socket of a netdev."""

    def __init__(self, path: str, mtu: int) -> None:
        self.max_frame = mtu + ETH_HEADER
        self._stream: Final = open_stream(path)

    def send(self, frames: Sequence[bytes]) -> int:
        """See `Link.send`."""
        for count, frame in enumerate(frames):
            if not self._stream.send(frame):
                return count
        return len(frames)

    def receive(self) -> list[bytes]:
        """See `Link.receive`."""
        self._stream.flush()
        return self._stream.receive()

    def wait(self, timeout: float, *, room: bool) -> None:
        """See `Link.wait`."""
        poll = select.poll()
        poll.register(self._stream, select.POLLIN | (select.POLLOUT if room and self._stream.blocked else 0))
        poll.poll(max(0.0, timeout) * 1000)

    def close(self) -> None:
        """See `Link.close`."""
        self._stream.close()


class VhostLink:
    """The socket of a device that is bound to ``vhost_mdev``: the first queue pair of it."""

    def __init__(self, path: str, mtu: int) -> None:
        with ExitStack() as undo:
            self._frontend: Final = undo.enter_context(VhostUserFrontend(path))
            self._frontend.negotiate()
            self.max_frame = (self._read_mtu() or mtu) + ETH_HEADER
            memory = GuestMemory(_MEMORY)
            undo.callback(memory.close)
            self._frontend.share(memory)
            longest = self.max_frame + ETH_HEADER
            self._pair: Final = NetPair(memory, self._frontend.features, frame=longest, room=max(2048, longest + 12))
            undo.callback(self._pair.close)
            self._frontend.start(*self._pair.queues)
            self._undo: Final = undo.pop_all()

    def _read_mtu(self) -> int:
        """Return what the device says, 0 if it says nothing."""
        if ProtocolFeature.CONFIG not in self._frontend.protocol or not self._frontend.get_features() >> F_MTU & 1:
            return 0
        return int.from_bytes(self._frontend.get_config(MTU_AT, 2), "little")

    def send(self, frames: Sequence[bytes]) -> int:
        """See `Link.send`."""
        return self._pair.send(frames)

    def receive(self) -> list[bytes]:
        """See `Link.receive`."""
        return self._pair.receive()

    def wait(self, timeout: float, *, room: bool) -> None:
        """See `Link.wait`: a buffer that comes back from transmitting wakes us too, wanted or not."""
        del room
        self._pair.wait(timeout)
        self._check_connected()

    def _check_connected(self) -> None:
        poll = select.poll()
        poll.register(self._frontend.channel, select.POLLRDHUP)
        if poll.poll(0):
            raise MdevError(errno.ECONNRESET, "the peer has hung up")

    def close(self) -> None:
        """See `Link.close`: in order, so that the device is free when this returns; one that is gone has told so already."""
        with self._undo, suppress(MdevError):
            self._frontend.stop()
            self._frontend.set_status(0)


_LINKS: Final[dict[str, Callable[[str, int], Link]]] = {NETDEV: StreamLink, VHOST_USER: VhostLink}


def open_link(facts: Facts) -> Link:
    """Connect to a running device; errors as `check_kind` and `reach`."""
    make = _LINKS[check_kind(facts, NETDEV, VHOST_USER)]
    mtu = int(facts.get("mtu") or DEFAULT_MTU)
    return reach(facts, lambda path: make(path, mtu))
