"""The frontend's queues: a ring in shared memory with its eventfds, and pairs of them that carry frames.

They know nothing of a connection, so that a queue stopped on one can go on another. `VhostUserFrontend.start` connects
them. One thread at a time uses a queue.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.driverside import Completion, DriverRing, GuestMemory, Segment, make_driver_ring
from mdevkit_virtio.layout import NO_FEATURES, Feature, VringBase
from mdevkit_virtio.netspec import NUM_BUFFERS_AT, header_size


class FrontendQueue:
    """Queue `index` of a device. `base` is where it goes on, as in SET_VRING_BASE; stopping it updates that."""

    def __init__(self, index: int, ring: DriverRing) -> None:
        self.index: Final = index
        self.ring: Final = ring
        self.base = VringBase().encode(packed=Feature.RING_PACKED in ring.features)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        #: We write to `kick`; the device to `call`, and to `err` where the ring is broken.
        self.kick: Final = os.eventfd(0, flags)
        self.call: Final = os.eventfd(0, flags)
        self.err: Final = os.eventfd(0, flags)
        #: Kicks sent.
        self.kicks = 0

    def kick_if_needed(self) -> bool:
        """Kick the device, if it wants that for what was added since the last call; true if so."""
        needed = self.ring.needs_kick()
        if needed:
            os.eventfd_write(self.kick, 1)
            self.kicks += 1
        return needed

    def collect(self, most: int) -> list[Completion]:
        """Return what has come back since the last call; EPROTO for what was not there, or has more than `most` bytes in it."""
        try:
            found = self.ring.collect()
        except (LookupError, ValueError) as error:
            raise MdevError(errno.EPROTO, f"queue {self.index}: the device gave back a buffer it did not have") from error
        longest = max((done.length for done in found), default=0)
        if longest > most:
            raise MdevError(errno.EPROTO, f"queue {self.index}: the device wrote {longest} bytes into a buffer of {most}")
        return found

    def signals(self) -> int:
        """Return how often the device has signalled since the last call; never blocks."""
        try:
            return os.eventfd_read(self.call)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Give the eventfds back."""
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class NetPair:
    """A receive queue and a transmit queue of a network device: 2 * `pair` and 2 * `pair` + 1.

    `memory` gets the rings of `num` descriptors, `num` receive buffers of `room` bytes, and as many transmit buffers of
    `frame` bytes. `features` are those that are negotiated: they say what rings and headers look like. `allocate` takes
    over from `memory.allocate` for buffers, to place them.
    """

    def __init__(
        self,
        memory: GuestMemory,
        features: int = NO_FEATURES,
        *,
        num: int = 256,
        pair: int = 0,
        frame: int = 1514,
        room: int = 2048,
        allocate: Callable[[int], int] | None = None,
        alignment: int = 16,
    ) -> None:
        self.memory: Final = memory
        self.header: Final = header_size(features)
        self._frame: Final = frame
        self._room: Final = room
        rings = [make_driver_ring(memory, num, Feature(features), alignment) for _ in range(2)]
        self.rx: Final = FrontendQueue(2 * pair, rings[0])
        self.tx: Final = FrontendQueue(2 * pair + 1, rings[1])
        allocate = memory.allocate if allocate is None else allocate
        #: Where frames come and go; buffer i of each list belongs to token i of its ring.
        self.rx_buffers: Final = [allocate(room) for _ in range(num)]
        self.tx_buffers: Final = [allocate(self.header + frame) for _ in range(num)]
        self._unsent: Final = list(range(num - 1, -1, -1))
        self._arrived: Final[deque[Completion]] = deque()
        #: Frames given to the device, and frames it has given us.
        self.sent = 0
        self.received = 0
        for index in range(num):
            self._post(index)

    @property
    def queues(self) -> tuple[FrontendQueue, FrontendQueue]:
        """Receive and transmit queue."""
        return self.rx, self.tx

    def send(self, frames: Sequence[bytes]) -> int:
        """Make frames available, in order, as many as there is room for, and return how many those are.

        EMSGSIZE for a frame larger than the pair was made for; then none is sent.
        """
        if any(len(frame) > self._frame for frame in frames):
            raise MdevError(errno.EMSGSIZE, f"a frame is larger than the {self._frame} bytes of a transmit buffer")
        self._reclaim()
        count = 0
        for frame in frames[: len(self._unsent)]:
            index = self._unsent.pop()
            at = self.tx_buffers[index]
            self.memory.map[at : at + self.header + len(frame)] = bytes(self.header) + frame
            self.tx.ring.add([Segment(at, self.header + len(frame))], [], index)
            count += 1
        self.sent += count
        self.tx.kick_if_needed()
        return count

    def receive(self, limit: int | None = None) -> list[bytes]:
        """Return the frames that have come, `limit` at most, in order, and give their buffers to the device again.

        EPROTO for a device that gives back what it cannot; the pair is of no more use then.
        """
        frames: list[bytes] = []
        self._arrived.extend(self.rx.collect(self._room))
        while self._arrived and (limit is None or len(frames) < limit):
            buffers = self._buffers_of(self._arrived[0])
            if len(self._arrived) < buffers:
                break
            frames.append(b"".join(self._take(self.header if first else 0) for first in (True, *[False] * (buffers - 1))))
        self.received += len(frames)
        self.rx.kick_if_needed()
        return frames

    def exchange(self, frames: Sequence[bytes], timeout: float = 10.0) -> list[bytes]:
        """Send all of `frames` and return as many that came; ETIMEDOUT says how many have not come within `timeout` seconds.

        For devices that send each frame back.
        """
        came: list[bytes] = []
        sent = 0
        deadline = time.monotonic() + timeout
        while len(came) < len(frames):
            sent += self.send(frames[sent:])
            news = self.receive(len(frames) - len(came))
            came += news
            if not news and not self.wait(deadline - time.monotonic()):
                raise MdevError(errno.ETIMEDOUT, f"{len(frames) - len(came)} of {len(frames)} frames did not come in {timeout:g} s")
        return came

    def settle(self, timeout: float = 10.0) -> None:
        """Wait, without a write to memory, until the device has given back all that was sent; ETIMEDOUT if it does not."""
        deadline = time.monotonic() + timeout
        while self.tx.ring.completed < self.tx.ring.outstanding:
            if time.monotonic() > deadline:
                left = self.tx.ring.outstanding - self.tx.ring.completed
                raise MdevError(errno.ETIMEDOUT, f"the device has not given {left} frames back within {timeout:g} s")
            time.sleep(0.0005)  # it may poll: no signal would come

    def wait(self, timeout: float) -> bool:
        """Wait until the device has given a buffer back, on either queue; false if it has not within `timeout` seconds."""
        if timeout <= 0:
            return False
        for queue in self.queues:
            queue.signals()
            queue.ring.want_signals(True)
        ready = any(queue.ring.completed for queue in self.queues)
        if not ready:
            poll = select.poll()
            for queue in self.queues:
                poll.register(queue.call, select.POLLIN)
            ready = bool(poll.poll(timeout * 1000))
        for queue in self.queues:
            queue.ring.want_signals(False)
        return ready

    def close(self) -> None:
        """Give the eventfds back; the memory is the caller's."""
        for queue in self.queues:
            queue.close()

    def _post(self, index: int) -> None:
        self.rx.ring.add([], [Segment(self.rx_buffers[index], self._room)], index)

    def _reclaim(self) -> None:
        for done in self.tx.collect(0):
            self._unsent.append(done.token)

    def _buffers_of(self, first: Completion) -> int:
        """Return over how many buffers the frame is spread that starts in this one."""
        if self.header == NUM_BUFFERS_AT:
            return 1
        at = self.rx_buffers[first.token] + NUM_BUFFERS_AT
        return max(1, int.from_bytes(self.memory.map[at : at + 2], "little"))

    def _take(self, skip: int) -> bytes:
        done = self._arrived.popleft()
        at = self.rx_buffers[done.token]
        data = self.memory.map[at + skip : at + done.length]
        self._post(done.token)
        return data
