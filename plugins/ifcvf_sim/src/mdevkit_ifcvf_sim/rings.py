"""The rings of a function, by what the card does with frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mdevkit_virtio.config import ConfigSpace
from mdevkit_virtio.engine import Engine, Mover
from mdevkit_virtio.layout import MoveOptions
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.netmodel import NetModel
from mdevkit_virtio.netspec import CONFIG_FIELDS, CONFIG_SIZE, LINK_UP, RX, TX, NetFeature, header_size
from mdevkit_virtio.ops import DeviceId
from mdevkit_virtio.workers import MoverWorker, Queues, Worker

if TYPE_CHECKING:
    from mdevkit_ifcvf_sim.card import Card

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
