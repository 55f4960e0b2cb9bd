"""What the card does with frames: each function's back to itself, or between its functions, by address.

The functions of one card share it. Frames are moved on threads of the functions' rings; any thread may add and remove functions.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from typing import Final

from mdevkit.errors import MdevError
from mdevkit_virtio.config import ConfigSpace
from mdevkit_virtio.engine import Engine, Mover
from mdevkit_virtio.layout import MoveOptions
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.netmodel import NetModel
from mdevkit_virtio.netspec import CONFIG_FIELDS, CONFIG_SIZE, LINK_UP, RX, TX, NetFeature, header_size
from mdevkit_virtio.ops import DeviceId
from mdevkit_virtio.workers import MoverWorker, Queues, Worker

LOOPBACK: Final = "loopback"
SWITCH: Final = "switch"

VENDOR: Final = 0x8086
#: Largest ring the card takes (IFCVF_QUEUE_MAX).
MAX_RING: Final = 32768
#: What the hardware offers: its parent driver passes on less (`driver.FEATURES`), a guest that has the whole function gets it all.
FEATURES: Final = (
    NetFeature.MAC
    | NetFeature.STATUS
    | NetFeature.MRG_RXBUF
    | NetFeature.ANY_LAYOUT
    | NetFeature.INDIRECT_DESC
    | NetFeature.EVENT_IDX
    | NetFeature.VERSION_1
    | NetFeature.ACCESS_PLATFORM
    | NetFeature.ORDER_PLATFORM
)


class LoopRings(VirtioModel):
    """A function whose frames come back, moved by the engine: nothing is lost, also not when it is stopped."""

    device_id = DeviceId.NET
    vendor_id = VENDOR

    def __init__(self, mac: bytes, name: str, engine: Engine | None = None) -> None:
        config = ConfigSpace(CONFIG_FIELDS, CONFIG_SIZE)
        config.update(mac=mac, status=LINK_UP, max_virtqueue_pairs=1, mtu=1500)
        super().__init__([MAX_RING] * 2, FEATURES, config, name=name, engine=engine)

    def make_workers(self) -> Sequence[Worker]:
        """See `VirtioModel.make_workers`."""
        return [MoverWorker(f"{self.name} rings", (RX, TX), self.queue_broke, engine=self.engine, make_movers=self._make_movers)]

    def _make_movers(self, queues: Queues) -> Sequence[Mover]:
        if len(queues) < 2 or any(queue.broken for queue in queues.values()):
            return []
        header = header_size(self.accepted)
        mergeable = bool(self.accepted & NetFeature.MRG_RXBUF)
        return [self.engine.mover(queues[TX].ring, queues[RX].ring, MoveOptions(header, header, mergeable))]


class SwitchRings(NetModel):
    """A function on the card's switch."""

    vendor_id = VENDOR

    def __init__(self, card: Card, mac: bytes, name: str, engine: Engine | None = None) -> None:
        super().__init__(mac, name=name, queue_size=MAX_RING, features=FEATURES, engine=engine)
        self._card: Final = card
        #: The address frames for this function have.
        self.mac: Final = mac

    def transmit(self, frame: bytes) -> None:
        """See `NetModel.transmit`."""
        self._card.forward(self, frame)


class Card:
    """The part of the card its functions share."""

    def __init__(self) -> None:
        self._forwarding = LOOPBACK
        self._functions: list[LoopRings | SwitchRings] = []
        self._lock: Final = threading.Lock()

    @property
    def forwarding(self) -> str:
        """``loopback`` or ``switch``."""
        return self._forwarding

    def set_forwarding(self, forwarding: str) -> None:
        """Say what is done with frames from now on: EBUSY while a function is in use."""
        with self._lock:
            if forwarding != self._forwarding and self._functions:
                used = ", ".join(map(str, self._functions))
                raise MdevError(errno.EBUSY, f"forwarding stays {self._forwarding} while functions are in use ({used})", self)
            self._forwarding = forwarding

    def add(self, mac: bytes, name: str) -> LoopRings | SwitchRings:
        """Return the rings of a function that is now in use."""
        with self._lock:
            rings = LoopRings(mac, name) if self._forwarding == LOOPBACK else SwitchRings(self, mac, name)
            self._functions.append(rings)
            return rings

    def remove(self, rings: LoopRings | SwitchRings) -> None:
        """Take a function out of use and end its threads."""
        with self._lock:
            self._functions.remove(rings)
        rings.close()

    def forward(self, source: SwitchRings, frame: bytes) -> None:
        """Carry a frame to the function that has its address; a group's, and one for nobody known, goes to all others."""
        with self._lock:
            others = [rings for rings in self._functions if isinstance(rings, SwitchRings) and rings is not source]
        exact = [rings for rings in others if rings.mac == frame[:6]]
        for rings in exact or others:
            rings.deliver(frame)
