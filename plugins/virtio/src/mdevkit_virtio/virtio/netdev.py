"""A network device of this process: frames go in with `send`, and come out at the port that is connected.

What connects is a `NetPort`: a program at the netdev's socket, a TAP, or `FrameQueue` for code of this process. One at a time; with
none, what comes is dropped and counted, as Linux does with a device nobody listens to.

Threads. Received frames reach the port on the device's interrupt thread, which must not wait: a port that cannot take a frame
says so, and frames stay in the device's queue until it calls `NetDevice.resume`; nothing is lost. `send` may be called from any
thread; it waits for room, except on the interrupt thread, where that would be for ever: there, and in ports, use `try_send`.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import TracebackType
from typing import Final, Self

from mdevkit.errors import MdevError, brief

from mdevkit_virtio.netspec import HEADER, NUM_BUFFERS_AT
from mdevkit_virtio.virtio.irq import InterruptThread
from mdevkit_virtio.virtio.vring import DriverVirtqueue, Slot

log = logging.getLogger("mdevkit.virtio")

#: Bytes of an Ethernet header, with a VLAN tag, and the shortest frame: a header with nothing behind it.
ETH_HEADER: Final = 14
VLAN_TAG: Final = 4
#: Bytes of a frame that tell flows apart: MAC and IP addresses, ports.
_FLOW: Final = 42
#: Frames received from one queue before everything else of the device has its turn (NAPI_POLL_WEIGHT).
_BUDGET: Final = 64


@dataclass
class NetStatistics:
    """Counters of a netdev (struct rtnl_link_stats64), by Linux's names."""

    rx_packets: int = 0
    rx_bytes: int = 0
    rx_errors: int = 0
    #: Received while nobody was connected.
    rx_nohandler: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    tx_dropped: int = 0

    def __add__(self, other: NetStatistics) -> NetStatistics:
        return NetStatistics(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class NetPort:
    """What is connected to a netdev. Methods are called on its interrupt thread, must not wait, and must not raise."""

    #: Who that is, for people: ``qemu-system-x86 (pid 42)``.
    name: str = "a port"

    def receive(self, frame: bytes) -> bool:
        """Take a frame; false holds it and all that follow in the device until `NetDevice.resume`."""
        raise NotImplementedError

    def on_room(self) -> None:
        """React to room in the transmit queue, which a `try_send` of this port has found full."""

    def on_link(self, up: bool) -> None:
        """React to a change of the carrier."""

    def on_gone(self) -> None:
        """React to the end of the netdev: it is not connected any more."""


class _Transmit:
    """A transmit queue, and the lock of it."""

    def __init__(self, queue: DriverVirtqueue) -> None:
        self.queue: Final = queue
        self.lock: Final = threading.Condition()
        self.statistics: Final = NetStatistics()
        #: Whether somebody waits for room.
        self.wanted = False
        #: Why nothing goes out any more, and the memory may be gone; None as long as it does.
        self.ended: MdevError | None = None
        for slot in queue.free:
            # Nothing is left to the device: no checksum, no segmentation. It reads that, and never writes it.
            queue.ring.memory.map[slot.address : slot.address + HEADER] = bytes(HEADER)

    def reclaim(self) -> None:
        self.queue.free.extend(slot for slot, _ in self.queue.collect())

    def find_room(self, want: bool) -> Slot | None:
        """Return a free buffer; without one, ask for an interrupt if so wanted. Raises what the queue has ended with."""
        if self.ended is not None:
            raise brief(self.ended)
        if not self.queue.free:
            self.reclaim()
        if not self.queue.free and want:
            self.wanted = True
            self.queue.enable_signals()
            self.reclaim()
        return self.queue.free.pop() if self.queue.free else None

    def end(self, reason: MdevError) -> None:
        """Let nobody use the queue any more, whoever waits for room included; the first reason stays."""
        with self.lock:
            self.ended = self.ended or reason
            self.lock.notify_all()

    def put(self, slot: Slot, frame: bytes) -> None:
        start = slot.address + HEADER
        self.queue.ring.memory.map[start : start + len(frame)] = frame
        self.queue.add(slot, HEADER + len(frame))
        self.statistics.tx_packets += 1
        self.statistics.tx_bytes += len(frame)
        self.queue.kick()


class _Receive:
    """A receive queue; it belongs to the interrupt thread."""

    def __init__(self, queue: DriverVirtqueue) -> None:
        self.queue: Final = queue
        self.statistics: Final = NetStatistics()
        #: Buffers the device has given back and whose frame has not been delivered, with the bytes in them.
        self.pending: Final[deque[tuple[Slot, int]]] = deque()

    def fill(self) -> None:
        """Give every free buffer to the device."""
        if self.queue.free:
            while self.queue.free:
                slot = self.queue.free.pop()
                self.queue.add(slot, slot.size)
            self.queue.kick()

    def collect(self) -> bool:
        """Look for frames; true if there are any, delivered before or not."""
        self.pending.extend(self.queue.collect())
        return bool(self.pending)

    def next_frame(self) -> tuple[bytes | None, int]:
        """Return the frame in front and how many buffers it takes; None for what is no frame.

        The buffers of one frame come together (virtio 1.2, 5.1.6.4.1): fewer than it says are no frame either.
        """
        slot, length = self.pending[0]
        count = int.from_bytes(self.queue.bytes_at(slot.address + NUM_BUFFERS_AT, 2), "little") or 1
        buffers = list(itertools.islice(self.pending, count))
        if length < HEADER + ETH_HEADER or len(buffers) < count or any(size > slot.size for slot, size in buffers):
            return None, len(buffers)
        first = self.queue.bytes_at(slot.address + HEADER, length - HEADER)
        rest = [self.queue.bytes_at(slot.address, size) for slot, size in buffers[1:]]
        return b"".join([first, *rest]) if rest else first, count

    def drop(self, count: int) -> None:
        """Take the buffers in front back; `fill` gives them to the device again."""
        for _ in range(count):
            self.queue.free.append(self.pending.popleft()[0])


class NetDevice:
    """A netdev. `mtu` is the largest payload of a frame in bytes; a frame is 14 bytes longer, 18 with a VLAN tag."""

    def __init__(self, name: str, mac: bytes, mtu: int, irq: InterruptThread) -> None:
        self.name: Final = name
        self.mac: Final = mac
        self.mtu: Final = mtu
        self.irq: Final = irq
        self._carrier = True
        #: Why nothing can be sent any more; None as long as it can.
        self.broken: MdevError | None = None
        self._port: NetPort | None = None
        self._tx: Sequence[_Transmit] = ()
        self._rx: Sequence[_Receive] = ()
        #: Notified when the port goes. Its lock is taken last, and never held over a wait for a handler.
        self._freed: Final = threading.Condition()
        self._leaving = False
        self._held = False
        self._before = NetStatistics()

    def __str__(self) -> str:
        return f"netdev {self.name}"

    # -- what everybody may ask ------------------------------------------------------------------------------------------

    @property
    def max_frame(self) -> int:
        """Bytes of the longest frame."""
        return self.mtu + ETH_HEADER + VLAN_TAG

    @property
    def carrier(self) -> bool:
        """Whether the link is up."""
        return self._carrier

    @property
    def queue_pairs(self) -> int:
        """How many queue pairs are in use; 0 while the device is suspended or gone."""
        return len(self._tx)

    @property
    def port(self) -> NetPort | None:
        """Who is connected."""
        return self._port

    @property
    def free(self) -> bool:
        """Whether `connect` would succeed; certain on the interrupt thread, or with it paused."""
        return self._port is None and self.broken is None and not self._leaving

    @property
    def statistics(self) -> NetStatistics:
        """What there has been since the driver took the device; a snapshot, each counter right at some moment."""
        with self.irq.paused():
            queues: list[_Transmit | _Receive] = [*self._tx, *self._rx]
            return sum((queue.statistics for queue in queues), NetStatistics() + self._before)

    @property
    def queue_statistics(self) -> list[NetStatistics]:
        """The same by queue pair."""
        with self.irq.paused():
            return [tx.statistics + rx.statistics for tx, rx in zip(self._tx, self._rx, strict=True)]

    # -- sending ---------------------------------------------------------------------------------------------------------

    def send(self, frame: bytes, *, timeout: float | None = 10.0) -> None:
        """Send an Ethernet frame (without its checksum), waiting for room up to `timeout` seconds; None: for ever.

        EINVAL for less than a header, EMSGSIZE for more than the MTU allows, ENETDOWN while the link is down, EIO or ENODEV once
        the device is broken or gone, EDEADLK on the interrupt thread where it would have to wait. ETIMEDOUT: the device has taken
        nothing; where it sends frames back, they may have to be received first.
        """
        queue = self._check(frame)
        deadline = None if timeout is None else time.monotonic() + timeout
        with queue.lock:
            while (slot := queue.find_room(want=True)) is None:
                if self.irq.current:
                    raise MdevError(errno.EDEADLK, f"{self} cannot wait for room on its interrupt thread; use try_send", self)
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not queue.lock.wait(left):
                    message = f"{self}: the device has taken no frame for {timeout:g} s; does somebody read what it has sent?"
                    raise MdevError(errno.ETIMEDOUT, message, self)
            queue.put(slot, frame)

    def try_send(self, frame: bytes) -> bool:
        """Send a frame if there is room, else return false and call the port's `on_room` once there is. Errors as `send`."""
        queue = self._check(frame)
        with queue.lock:
            slot = queue.find_room(want=True)
            if slot is not None:
                queue.put(slot, frame)
            return slot is not None

    def count_tx_dropped(self) -> None:
        """Count a frame that somebody wanted to send and could not be; for ports."""
        with self.irq.paused():
            self._before.tx_dropped += 1

    def _check(self, frame: bytes) -> _Transmit:
        if not ETH_HEADER <= len(frame) <= self.max_frame:
            if len(frame) < ETH_HEADER:
                raise MdevError(errno.EINVAL, f"{self}: {len(frame)} bytes are no Ethernet frame, {ETH_HEADER} are the least", self)
            message = f"{self}: a frame of {len(frame)} bytes is longer than the {self.max_frame} its MTU of {self.mtu} allows"
            raise MdevError(errno.EMSGSIZE, message, self)
        # Read once: another thread may suspend the device. A queue it has taken down raises by itself.
        queues = self._tx
        if self.broken is not None:
            raise brief(self.broken)
        if not queues:
            raise self._suspended()
        if not self._carrier:
            raise MdevError(errno.ENETDOWN, f"{self}: the link is down", self)
        return queues[zlib.crc32(frame[:_FLOW]) % len(queues)] if len(queues) > 1 else queues[0]

    def _suspended(self) -> MdevError:
        return MdevError(errno.ENETDOWN, f"{self} is suspended", self)

    # -- receiving -------------------------------------------------------------------------------------------------------

    def connect(self, port: NetPort) -> None:
        """Give frames to `port` from now on: ENODEV once the netdev is gone.

        EBUSY names whoever is connected already, or says that the netdev is about to go: see `let_go`.
        """
        with self.irq.paused():
            if self.broken is not None:
                raise brief(self.broken)
            if self._leaving:
                raise MdevError(errno.EBUSY, f"{self} is about to be taken away", self)
            if self._port is not None:
                raise MdevError(errno.EBUSY, f"{self} is in use by {self._port.name}", self)
            self._port = port

    def disconnect(self, port: NetPort) -> None:
        """End what `connect` began; `port` is not called any more when this returns. Harmless if it is not connected."""
        with self.irq.paused():
            if self._port is port:
                self._part()
                self.resume()

    def let_go(self, timeout: float, force: bool) -> None:
        """Connect nobody any more, and wait up to `timeout` seconds for the port that is connected to disconnect.

        EBUSY names one that stays, and the netdev goes on as before; with `force` nobody is waited for.
        """
        with self.irq.paused():
            self._leaving = True
        if force:
            return
        with self._freed:
            self._freed.wait_for(lambda: self._port is None, timeout)
        with self.irq.paused():
            if self._port is not None:
                self._leaving = False
                raise MdevError(errno.EBUSY, f"{self} is in use by {self._port.name}", self)

    def _part(self) -> None:
        with self._freed:
            self._port = None
            self._freed.notify_all()

    def frames(self, limit: int = 1024) -> FrameQueue:
        """Connect a queue of up to `limit` received frames; a context manager that disconnects it. EBUSY as `connect`."""
        return FrameQueue(self, limit)

    def resume(self) -> None:
        """Deliver frames again, soon, after the port has refused one. From any thread."""
        self.irq.post(self._resume)

    def _resume(self) -> None:
        if self._held:
            self._held = False
            for index in range(len(self._rx)):
                self.rx_interrupt(index)

    def _poll(self, index: int) -> None:
        """Deliver the frames of a queue until there are none; then, and no sooner, ask for an interrupt (NAPI).

        While there are always more, go on after everybody else has had a turn.
        """
        queue, budget = self._rx[index], _BUDGET
        queue.queue.disable_signals()
        while not self._held:
            if not queue.collect():
                queue.queue.enable_signals()
                if not queue.collect():
                    return
            if budget <= 0:
                self.irq.post(partial(self.rx_interrupt, index))
                return
            budget -= len(queue.pending)
            if not self._deliver(queue):
                return
            queue.fill()

    def _deliver(self, queue: _Receive) -> bool:
        """Deliver what has been collected; false if the port takes no more."""
        while queue.pending:
            frame, count = queue.next_frame()
            if frame is None:
                queue.statistics.rx_errors += 1
            elif not self._hand_over(queue, frame):
                return False
            queue.drop(count)
        return True

    def _hand_over(self, queue: _Receive, frame: bytes) -> bool:
        if self._port is None:
            queue.statistics.rx_nohandler += 1
        elif not self._port.receive(frame):
            self._held = True
            return False
        queue.statistics.rx_packets += 1
        queue.statistics.rx_bytes += len(frame)
        return True

    # -- for the driver --------------------------------------------------------------------------------------------------

    def start(self, rx: Sequence[DriverVirtqueue], tx: Sequence[DriverVirtqueue]) -> None:
        """Begin with queues that are set up: as many of one kind as of the other."""
        with self.irq.paused():
            self._rx = [_Receive(queue) for queue in rx]
            self._tx = [_Transmit(queue) for queue in tx]
            self._held = False
            for receive in self._rx:
                receive.fill()
                receive.queue.enable_signals()
            for transmit in self._tx:
                transmit.queue.disable_signals()

    def stop(self) -> None:
        """Let go of the queues, before they are taken down; `start` goes on with others. Frames in them are lost."""
        with self.irq.paused():
            queues, self._before = self._tx, self.statistics
            self._tx, self._rx = (), ()
        for queue in queues:
            queue.end(self._suspended())

    def shut_down(self, reason: MdevError) -> None:
        """End the netdev: whoever sends or receives gets `reason`."""
        with self.irq.paused():
            port, queues, self.broken = self._port, self._tx, reason
            self._part()
        for queue in queues:
            queue.end(reason)
        if port is not None:
            port.on_gone()

    def rx_interrupt(self, index: int) -> None:
        """React to an interrupt of receive queue `index`; on the interrupt thread."""
        if index >= len(self._rx):
            return
        try:
            self._poll(index)
        except MdevError as error:
            # A device that writes nonsense breaks its netdev, nothing else.
            log.error("%s is broken: %s", self, error)
            # Not the error itself, which keeps its queue alive.
            self.shut_down(MdevError(error.errno or errno.EIO, f"{self} is broken: {error}", self))

    def tx_interrupt(self, index: int) -> None:
        """React to an interrupt of transmit queue `index`; on the interrupt thread."""
        if index >= len(self._tx):
            return
        queue = self._tx[index]
        with queue.lock:
            queue.queue.disable_signals()
            wanted, queue.wanted = queue.wanted, False
            queue.lock.notify_all()
        if wanted and self._port is not None:
            self._port.on_room()

    def set_carrier(self, up: bool) -> None:
        """Note the state of the link, and tell the port of a change; on the interrupt thread, or with it paused."""
        if up == self._carrier:
            return
        self._carrier = up
        log.info("%s: link %s", self, "up" if up else "down")
        if self._port is not None:
            self._port.on_link(up)


class FrameQueue(NetPort):
    """Received frames for code of this process: iterate, or `get`. When `limit` frames wait, the device holds the rest.

    Any thread may take frames. Iterating ends when the queue is closed; ENODEV once the netdev is gone.
    """

    def __init__(self, netdev: NetDevice, limit: int) -> None:
        self.name = f"a frame queue (pid {os.getpid()})"
        self._netdev: Final = netdev
        self._limit: Final = limit
        self._frames: Final[deque[bytes]] = deque()
        self._arrived: Final = threading.Condition()
        self._closed = False
        self._gone = False
        self._holding = False
        netdev.connect(self)

    def receive(self, frame: bytes) -> bool:
        """See `NetPort.receive`."""
        with self._arrived:
            if len(self._frames) >= self._limit:
                self._holding = True
                return False
            self._frames.append(frame)
            self._arrived.notify()
            return True

    def on_gone(self) -> None:
        """See `NetPort.on_gone`."""
        with self._arrived:
            self._gone = True
            self._arrived.notify_all()

    def get(self, timeout: float | None = None) -> bytes:
        """Return the next frame: ETIMEDOUT if none comes within `timeout` seconds, ENODEV once there will be none any more."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._frames or self._gone or self._closed, timeout):
                raise MdevError(errno.ETIMEDOUT, f"{self._netdev} has received no frame for {timeout:g} s", self._netdev)
            if not self._frames:
                raise MdevError(errno.ENODEV, f"{self._netdev} receives no more: it is {self._ended()}", self._netdev)
            frame = self._frames.popleft()
            resume = self._holding and len(self._frames) <= self._limit // 2
            self._holding = self._holding and not resume
        if resume:
            self._netdev.resume()
        return frame

    def _ended(self) -> str:
        return "gone" if self._gone else "disconnected"

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                frame = self.get()
            except MdevError:
                if self._gone:
                    raise
                return
            yield frame

    def close(self) -> None:
        """Disconnect; frames that wait are lost. Closing twice is harmless."""
        self._netdev.disconnect(self)
        with self._arrived:
            self._closed = True
            self._frames.clear()
            self._arrived.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
