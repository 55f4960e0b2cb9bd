"""Fixtures of the vhost-user tests: a loopback network device, served, and frontends on it; nothing of either may be left."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from mdevkit_virtio.config import ConfigSpace, Field
from mdevkit_virtio.layout import Feature, MoveOptions
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.ops import DeviceId
from mdevkit_virtio.vhost.frontend import FEATURES, PROTOCOL, GuestMemory, NetPair, PageLog, VhostUserFrontend
from mdevkit_virtio.vhost.server import VhostUserServer
from mdevkit_virtio.vhost.sources import Listening
from mdevkit_virtio.workers import MoverWorker

MAC = bytes.fromhex("020000000001")
MTU = 1 << 3
HAS_MAC = 1 << 5
MQ = 1 << 22
ACCESS_PLATFORM = 1 << 33
RINGS = Feature.VERSION_1 | Feature.NET_MRG_RXBUF | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED


class Loopback(VirtioModel):
    """Sends every frame back; what a vendor would write."""

    device_id = DeviceId.NET

    def __init__(self, pairs=1, features=RINGS | HAS_MAC | MTU, name="loop", num=256):
        fields = [Field("mac", 0, 6), Field("status", 6, 2), Field("max_pairs", 8, 2), Field("mtu", 10, 2)]
        super().__init__([num] * (2 * pairs), int(features), ConfigSpace(fields), name=name)
        self.config.update(mac=MAC, status=1, max_pairs=pairs, mtu=1500)
        self.pairs = pairs

    def make_workers(self):
        return [self._worker(2 * pair) for pair in range(self.pairs)]

    def _worker(self, rx):
        def movers(queues):
            if not {rx, rx + 1} <= set(queues):
                return []
            mergeable = Feature.NET_MRG_RXBUF in self.accepted
            header = 12 if self.accepted & (Feature.VERSION_1 | Feature.NET_MRG_RXBUF) else 10
            options = MoveOptions(header, header, mergeable=mergeable)
            return [self.engine.mover(queues[rx + 1].ring, queues[rx].ring, options)]

        return MoverWorker(f"{self.name} {rx}", (rx, rx + 1), self.queue_broke, engine=self.engine, make_movers=movers)


class Served:
    """A device at a socket, and what its clients have said."""

    def __init__(self, ops, source):
        self.ops = ops
        self.source = source
        self.path = source.path
        self.exchanges = []
        self.server = VhostUserServer(ops, source, ops.name)
        self.server.observer = self.exchanges.append
        self.server.examine()
        self.server.start()

    def refusals(self):
        """Return the sentences with which messages were refused."""
        return [str(exchange.error) for exchange in self.exchanges if exchange.error is not None]

    def close(self):
        self.server.close()
        self.ops.close()


class Net:
    """A frontend with memory and queue pairs, set up and started as asked."""

    def __init__(self, where, *, features=FEATURES, protocol=PROTOCOL, pairs=1, num=64, size=1 << 21, sealed=True, **more):
        self.frontend = VhostUserFrontend(where)
        self.memory = GuestMemory(size, sealed=sealed)
        self.frontend.negotiate(int(features), protocol)
        self.frontend.share(self.memory, **more)
        self.pairs = [NetPair(self.memory, self.frontend.features, num=num, pair=pair) for pair in range(pairs)]

    @property
    def queues(self):
        return [queue for pair in self.pairs for queue in pair.queues]

    def start(self):
        self.frontend.start(*self.queues)
        return self

    def check(self, count=200, pair=0):
        """Send frames and expect them back, in order, as they were."""
        frames = [bytes([n & 0xFF, n >> 8]) * (30 + n % 700) for n in range(count)]
        assert self.pairs[pair].exchange(frames) == frames

    def close(self):
        self.frontend.close()
        for pair in self.pairs:
            pair.close()
        self.memory.close()


def descriptors():
    """Return what this process has open, by kind: a memfd, an eventfd, a socket."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        # The one through which this reads the folder is gone when it is looked at.
        with contextlib.suppress(FileNotFoundError):
            links.append(str(entry.readlink()).split(":[")[0])
    return Counter(links)


@pytest.fixture(autouse=True)
def nothing_left():
    """Fail a test that leaves descriptors or threads behind, however its clients behaved."""
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    gc.collect()  # mappings go with their last view
    assert not descriptors() - fds


@pytest.fixture
def later(nothing_left):
    """Registers clean-up, done in reverse order."""
    undo = []
    yield undo.append
    while undo:
        undo.pop()()


@pytest.fixture
def loopback():
    """The device's class, for tests that change it."""
    return Loopback


@pytest.fixture
def serve(tmp_path, later):
    """Serves a device, by default a new `Loopback` of what else is given: ``serve(ops=None, source=None, pairs=2, ...)``."""

    def make(ops=None, source=None, **more):
        ops = ops or Loopback(**more)
        served = Served(ops, source or Listening(str(tmp_path / f"{ops.name}.sock")))
        later(served.close)
        return served

    return make


@pytest.fixture
def connect(later):
    """Makes a `Net` on a served device, started unless ``started=False``."""

    def make(where, *, started=True, **more):
        net = Net(getattr(where, "path", where), **more)
        later(net.close)
        return net.start() if started else net

    return make


@pytest.fixture
def client(later):
    """Makes a bare frontend: what it sends is the test's business."""

    def make(where, **more):
        frontend = VhostUserFrontend(getattr(where, "path", where), **more)
        later(frontend.close)
        return frontend

    return make


@pytest.fixture
def page_log(later):
    """Makes dirty logs."""

    def make(size):
        log = PageLog(size)
        later(log.close)
        return log

    return make


@pytest.fixture
def until():
    """Waits until something is so, and fails if it is not within ten seconds."""

    def wait(condition, seconds=10):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it has not come to be so"
            time.sleep(0.002)

    return wait
