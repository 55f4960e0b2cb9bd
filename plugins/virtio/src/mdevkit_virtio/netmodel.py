"""A network device whose frames pass through Python: for cards that look at them, such as one with a switch.

One that only moves frames between its own queues is faster with the engine's movers (`mdevkit_virtio.workers.MoverWorker`). Frames
are sent on the thread of the device's worker; `deliver` takes them from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mdevkit_virtio.config import ConfigSpace
from mdevkit_virtio.engine import Engine
from mdevkit_virtio.layout import MAX_FRAME, MAX_MERGE, Feature
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.netspec import CONFIG_FIELDS, CONFIG_SIZE, HEADER, LINK_UP, RX, TX, NetFeature, header_size
from mdevkit_virtio.ops import DeviceId
from mdevkit_virtio.queue import Buffer, Virtqueue
from mdevkit_virtio.workers import BufferWorker, Worker

#: What a device of this kind can offer.
FEATURES: Final = (
    NetFeature.MTU
    | NetFeature.MAC
    | NetFeature.STATUS
    | NetFeature.MRG_RXBUF
    | NetFeature.INDIRECT_DESC
    | NetFeature.EVENT_IDX
    | NetFeature.VERSION_1
    | NetFeature.RING_PACKED
)


@dataclass
class NetCounters:
    """What has passed, from the driver's side; written by the worker's thread alone, but for `rx_dropped`, which has a lock."""

    tx_packets: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0


class NetModel(VirtioModel):
    """A network device with one pair of queues of up to `queue_size` descriptors. A vendor overrides `transmit`.

    `backlog` frames wait for receive buffers at most. `mac` has 6 bytes, `mtu` is in bytes.
    """

    device_id = DeviceId.NET

    def __init__(
        self,
        mac: bytes,
        *,
        name: str,
        mtu: int = 1500,
        queue_size: int = 256,
        backlog: int = 1024,
        features: int = FEATURES,
        engine: Engine | None = None,
    ) -> None:
        config = ConfigSpace(CONFIG_FIELDS, CONFIG_SIZE)
        config.update(mac=mac, status=LINK_UP, max_virtqueue_pairs=1, mtu=mtu)
        super().__init__([queue_size, queue_size], features, config, name=name, engine=engine)
        self.counters: Final = NetCounters()
        self._incoming: Final[deque[bytes]] = deque()
        self._incoming_lock: Final = threading.Lock()
        self._backlog: Final = backlog
        #: Receive buffers that were taken and not used.
        self._spare: Final[list[Buffer]] = []
        self._worker: BufferWorker | None = None

    def transmit(self, frame: bytes) -> None:
        """Do with a frame what the device does; on the worker's thread, soon to return."""

    def deliver(self, frame: bytes) -> bool:
        """Let the driver receive a frame; false when too many wait already, or it is not running. Any thread, at any time."""
        worker = self._worker
        with self._incoming_lock:
            if worker is None or not self.running or len(self._incoming) >= self._backlog or len(frame) > MAX_FRAME - HEADER:
                self.counters.rx_dropped += 1
                return False
            self._incoming.append(frame)
        worker.wake(RX)
        return True

    # -- VirtioModel -----------------------------------------------------------------------------------------------------------

    def make_workers(self) -> Sequence[Worker]:
        """See `VirtioModel.make_workers`."""
        self._worker = BufferWorker(f"{self.name} frames", (RX, TX), self.queue_broke, self.on_buffers)
        return [self._worker]

    def on_buffers(self, index: int, queue: Virtqueue) -> None:
        """See `VirtioModel.on_buffers`."""
        if index == TX:
            self._send(queue)
        else:
            self._receive(queue)

    def queue_stopping(self, index: int, queue: Virtqueue) -> None:
        """See `VirtioModel.queue_stopping`: buffers that were not used are taken again by whoever goes on."""
        del queue
        if index == RX:
            self._spare.clear()

    def device_reset(self) -> None:
        """See `VirtioModel.device_reset`: what waits is for the driver that is gone."""
        with self._incoming_lock:
            self._incoming.clear()

    # -- on the worker's thread ------------------------------------------------------------------------------------------------

    def _send(self, queue: Virtqueue) -> None:
        """Send a batch: for what is left the worker comes back, so that a driver without an end to its frames holds up nobody."""
        header = header_size(self.accepted)
        buffers = queue.take()
        for buffer in buffers:
            if header < buffer.readable <= MAX_FRAME:
                frame = buffer.read(header, buffer.readable - header)
                self.counters.tx_packets += 1
                self.counters.tx_bytes += len(frame)
                self.transmit(frame)
        queue.complete(*((buffer, 0) for buffer in buffers))

    def _receive(self, queue: Virtqueue) -> None:
        """Give the driver what waits now; what comes meanwhile wakes the worker again."""
        for _ in range(len(self._incoming)):
            frame = self._incoming[0]
            buffers = self._room_for(len(frame) + header_size(self.accepted), queue)
            if buffers is None:
                return
            with self._incoming_lock:
                self._incoming.popleft()
                self.counters.rx_dropped += not buffers
            if buffers:
                self._write(queue, buffers, frame)

    def _room_for(self, size: int, queue: Virtqueue) -> list[Buffer] | None:
        """Take buffers for `size` bytes: None as long as there are too few, none at all for what will never fit."""
        merge = Feature.NET_MRG_RXBUF in self.accepted
        # More than the whole ring will not come; and a driver may have filled it with buffers that have no room at all.
        most = min(queue.setup.num, MAX_MERGE)
        while not self._spare or (merge and sum(buffer.writable for buffer in self._spare) < size):
            if len(self._spare) >= most:
                return []
            taken = queue.take(1)
            if not taken:
                return None
            self._spare.extend(taken)
        buffers: list[Buffer] = []
        room = 0
        while room < size and self._spare and (merge or not buffers):
            buffers.append(self._spare.pop(0))
            room += buffers[-1].writable
        if room < size:
            self._spare[:0] = buffers
            return []
        return buffers

    def _write(self, queue: Virtqueue, buffers: list[Buffer], frame: bytes) -> None:
        header = bytearray(header_size(self.accepted))
        if len(header) == HEADER:
            header[10:] = len(buffers).to_bytes(2, "little")
        data, done = bytes(header) + frame, []
        for buffer in buffers:
            part, data = data[: buffer.writable], data[buffer.writable :]
            buffer.write(part)
            done.append((buffer, len(part)))
        # Counted first: whoever sees the frame finds it counted.
        self.counters.rx_packets += 1
        self.counters.rx_bytes += len(frame)
        queue.complete(*done)
