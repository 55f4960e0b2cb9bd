"""The card: for each queue pair a data thread that moves frames from the transmit to the receive queue.

Ops come from the driver's thread, attributes from any: see `mdevkit_virtio.model`. `SampleDevice` is ``compat=linux``.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from mdevkit.errors import MdevError
from mdevkit_virtio import netspec
from mdevkit_virtio.address import mac_bytes
from mdevkit_virtio.config import ConfigSpace
from mdevkit_virtio.layout import MoveCounters, MoveOptions
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.netspec import NetFeature
from mdevkit_virtio.ops import DeviceId
from mdevkit_virtio.workers import MoverWorker, Queues, Worker, add_counters

from mdevkit_mvnet import regs
from mdevkit_mvnet.attributes import DOWN, DROP, LINUX, LOSSLESS, NONE, UP

if TYPE_CHECKING:
    from uuid import UUID

    from mdevkit_virtio.engine import Engine, Mover, Ring
    from mdevkit_virtio.queue import Virtqueue


class Pair:
    """What one queue pair has done, over all movers and rings it had. Any thread may read it."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._before = MoveCounters(0, 0, 0, 0, 0)
        self._mover: Mover | None = None
        #: Kicks and signals of the rings that are gone; then those that are there, receive first.
        self._past: Final = [[0, 0], [0, 0]]
        self._rings: list[Ring | None] = [None, None]

    def replace(self, mover: Mover | None, rings: list[Ring | None]) -> None:
        """Count on with another mover and other rings."""
        with self._lock:
            if self._mover is not None:
                self._before = add_counters(self._before, self._mover.counters)
            self._mover = mover
            for past, old, new in zip(self._past, self._rings, rings, strict=True):
                if old is not None and old is not new:
                    past[0] += old.kicks
                    past[1] += old.calls
            self._rings = rings

    @property
    def counters(self) -> MoveCounters:
        """What was moved and what was not."""
        with self._lock:
            return self._before if self._mover is None else add_counters(self._before, self._mover.counters)

    def kicks(self, which: int) -> int:
        """How often a queue was kicked; 0 is receive, 1 transmit."""
        with self._lock:
            ring = self._rings[which]
            return self._past[which][0] + (ring.kicks if ring is not None else 0)

    def signals(self, which: int) -> int:
        """How often the driver was signalled for a queue."""
        with self._lock:
            ring = self._rings[which]
            return self._past[which][1] + (ring.calls if ring is not None else 0)


class MvnetDevice(VirtioModel):
    """A loopback card: the driver's queue 2i receives what it sends through 2i + 1."""

    device_id = DeviceId.NET
    #: Value of the attribute ``compat``.
    compat: ClassVar[str] = NONE
    config_size: ClassVar[int] = netspec.CONFIG_SIZE

    def __init__(
        self,
        *,
        name: str,
        mac: bytes,
        mtu: int = 1500,
        pairs: int = 1,
        queue_size: int = 256,
        features: int = int(regs.FEATURES & ~regs.OFFLOADS),
        policy: str = LOSSLESS,
        link: str = UP,
        spin_us: int = 50,
        engine: Engine | None = None,
    ) -> None:
        config = ConfigSpace(netspec.CONFIG_FIELDS, self.config_size)
        config.update(
            mac=mac,
            status=netspec.LINK_UP if link == UP else 0,
            max_virtqueue_pairs=pairs,
            mtu=mtu,
            speed=netspec.SPEED_UNKNOWN,
            duplex=netspec.DUPLEX_UNKNOWN,
        )
        super().__init__([queue_size] * (2 * pairs), features, config, name=name, engine=engine)
        self.pairs: Final = pairs
        self.policy = policy
        self.spin_us: Final = spin_us
        self._statistics: Final = [Pair() for _ in range(pairs)]

    # -- for attributes ------------------------------------------------------------------------------------------------------

    @property
    def mac(self) -> str:
        """The address in the configuration, as text."""
        return self.config.get_bytes("mac").hex(":")

    @property
    def mtu(self) -> int:
        """The MTU in the configuration."""
        return self.config["mtu"]

    @property
    def link(self) -> str:
        """``up`` or ``down``."""
        return UP if self.config["status"] & netspec.LINK_UP else DOWN

    def set_link(self, link: str) -> None:
        """Plug the cable in or out, and tell the driver; any thread."""
        with self.changing():
            self.update_config(status=netspec.LINK_UP if link == UP else 0)

    def set_policy(self, policy: str) -> None:
        """Change what becomes of frames without a receive buffer; any thread."""
        with self.changing():
            self.policy = policy

    def statistic(self, name: str) -> Sequence[int]:
        """Return a statistic (`attributes.STATISTICS`) of every pair; any thread."""
        return [_STATISTICS[name](pair) for pair in self._statistics]

    # -- hooks ---------------------------------------------------------------------------------------------------------------

    def make_workers(self) -> Sequence[Worker]:
        """See `VirtioModel.make_workers`: a data thread for each pair."""
        return [
            MoverWorker(
                f"{self.name} pair {pair}",
                (2 * pair, 2 * pair + 1),
                self.queue_broke,
                engine=self.engine,
                make_movers=partial(self._make_movers, pair),
                spin_us=self.spin_us,
            )
            for pair in range(self.pairs)
        ]

    def _make_movers(self, pair: int, queues: Queues) -> Sequence[Mover]:
        receive, transmit = queues.get(2 * pair), queues.get(2 * pair + 1)
        rings = [_sound_ring(queue) for queue in (receive, transmit)]
        mover = self._make_mover(*rings)
        self._statistics[pair].replace(mover, rings)
        return [] if mover is None else [mover]

    def _make_mover(self, rx: Ring | None, tx: Ring | None) -> Mover | None:
        if tx is None:
            return None
        if self.link == DOWN:
            return self.engine.mover(tx, None, self._move_options())
        if rx is None and self.policy == LOSSLESS:
            return None  # frames wait until the driver has its receive queue ready too
        return self.engine.mover(tx, rx, self._move_options())

    def _move_options(self) -> MoveOptions:
        mergeable = bool(self.accepted & NetFeature.MRG_RXBUF)
        header = netspec.header_size(self.accepted)
        return MoveOptions(header, header, mergeable, self.policy == DROP, self.keeps_header)

    @property
    def keeps_header(self) -> bool:
        """Whether what a driver wrote into a frame's header is delivered with it."""
        return False


class SampleDevice(MvnetDevice):
    """The card of the series, as far as a driver can tell: what it offers, demands, and gets wrong."""

    compat = LINUX
    config_size = regs.LINUX_CONFIG_SIZE

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "features": int(regs.LINUX_FEATURES)})

    def set_features(self, features: int) -> None:
        """Take those that are offered, and ignore the others."""
        super().set_features(features & self.features)

    def check_features(self, features: int) -> None:
        """See `VirtioModel.check_features`: without ACCESS_PLATFORM the sample cannot reach memory."""
        if not features & NetFeature.ACCESS_PLATFORM:
            raise MdevError(errno.EINVAL, f"{self}: features {features:#x} lack ACCESS_PLATFORM (bit 33)", self)

    def get_config(self, offset: int, length: int) -> bytes:
        """Read the configuration, without its last byte: there the sample leaves the driver's buffer as it was, here it is 0."""
        return super().get_config(offset, length) if offset + length < self.config_size else bytes(length)

    def set_config(self, offset: int, data: bytes) -> None:
        """Ignore it."""

    @property
    def keeps_header(self) -> bool:
        """See `MvnetDevice.keeps_header`: the sample copies it."""
        return True


def _sound_ring(queue: Virtqueue | None) -> Ring | None:
    return None if queue is None or queue.broken is not None else queue.ring


_STATISTICS: Final = {
    "rx_packets": lambda pair: pair.counters.frames,
    "rx_bytes": lambda pair: pair.counters.bytes,
    "rx_kicks": lambda pair: pair.kicks(0),
    "rx_signals": lambda pair: pair.signals(0),
    "tx_packets": lambda pair: pair.counters.frames + pair.counters.dropped + pair.counters.malformed + pair.counters.oversize,
    "tx_dropped": lambda pair: pair.counters.dropped,
    "tx_errors": lambda pair: pair.counters.malformed + pair.counters.oversize,
    "tx_kicks": lambda pair: pair.kicks(1),
    "tx_signals": lambda pair: pair.signals(1),
}


def make_device(uuid: UUID, params: Mapping[str, Any]) -> MvnetDevice:
    """Return a card with these create parameters."""
    kind = SampleDevice if params["compat"] == LINUX else MvnetDevice
    return kind(
        name=f"mvnet {uuid}",
        mac=mac_bytes(params["mac"], uuid),
        mtu=params["mtu"],
        pairs=params["queues"],
        queue_size=params["queue_size"],
        features=params["features"],
        policy=params["policy"],
        link=params["link"],
        spin_us=params["spin_us"],
    )
