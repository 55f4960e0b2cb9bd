"""Fixtures of the tests that use our backend through our frontend: a loopback at a socket, and frontends that are closed."""

from __future__ import annotations

import time

import pytest
from mdevkit_virtio.config import ConfigSpace, Field
from mdevkit_virtio.layout import Feature, MoveOptions
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.vhost.frontend import NetPair, VhostUserFrontend
from mdevkit_virtio.vhost.server import VhostUserServer
from mdevkit_virtio.vhost.sources import Listening
from mdevkit_virtio.workers import MoverWorker

MAC = bytes.fromhex("020000000042")
F_MTU, F_MAC, F_MQ = 1 << 3, 1 << 5, 1 << 22
FEATURES = (
    Feature.VERSION_1
    | Feature.NET_MRG_RXBUF
    | Feature.EVENT_IDX
    | Feature.INDIRECT_DESC
    | Feature.RING_PACKED
    | Feature.IN_ORDER
    | F_MTU
    | F_MAC
    | F_MQ
)


class Loopback(VirtioModel):
    """A network device that sends back what it gets, on each queue pair."""

    device_id = 1

    def __init__(self, name, engine, pairs=1, num=1024):
        self.pairs = pairs
        self.loops = []
        fields = [Field("mac", 0, 6), Field("status", 6, 2), Field("pairs", 8, 2), Field("mtu", 10, 2)]
        super().__init__([num] * (2 * pairs), int(FEATURES), ConfigSpace(fields), name=name, engine=engine)
        self.config.update(mac=MAC, status=1, pairs=pairs, mtu=9000)

    def make_workers(self):
        return [self._worker(pair) for pair in range(self.pairs)]

    def _worker(self, pair):
        rx, tx = 2 * pair, 2 * pair + 1

        def make(queues):
            if rx not in queues or tx not in queues or queues[rx].broken or queues[tx].broken:
                return []
            mergeable = bool(self.accepted & Feature.NET_MRG_RXBUF)
            header = 12 if mergeable or self.accepted & Feature.VERSION_1 else 10
            return [self.engine.mover(queues[tx].ring, queues[rx].ring, MoveOptions(header, header, mergeable))]

        return MoverWorker(f"{self.name} {pair}", [rx, tx], self.queue_broke, engine=self.engine, make_movers=make, spin_us=20)


class Served:
    """A loopback at a socket."""

    def __init__(self, folder, number, engine, pairs):
        name = f"loop {number}"
        self.device = Loopback(name, engine, pairs)
        self.path = folder / f"{number}.sock"
        self.server = VhostUserServer(self.device, Listening(str(self.path)), name)
        self.server.examine()
        self.server.start()

    def until(self, true, seconds=20.0):
        """Poll for what nobody tells us of."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
            time.sleep(0.002)

    def until_free(self):
        """Wait until the last client is gone."""
        self.until(lambda: self.server.client is None)

    def close(self):
        self.server.close()
        self.device.close()


@pytest.fixture
def loopbacks(engine, tmp_path):
    """Serves loopbacks: ``loopbacks(pairs=1)``, of another engine if one is named."""
    made = []

    def make(pairs=1, engine=engine):
        made.append(Served(tmp_path, len(made), engine, pairs))
        return made[-1]

    yield make
    for served in made:
        served.close()


class Frontends:
    """Makes frontends, and queue pairs for them."""

    def __init__(self):
        self.made = []

    def __call__(self, where, **options):
        self.made.append(VhostUserFrontend(where, **options))
        return self.made[-1]

    def pair(self, memory, features=0, **options):
        self.made.append(NetPair(memory, features, **options))
        return self.made[-1]


@pytest.fixture
def frontends():
    factory = Frontends()
    yield factory
    for made in factory.made:
        made.close()
